import torch

from lckv.training.trainer import TrainingOrder


def test_every_epoch_is_a_new_permutation():
    order = list(TrainingOrder(num_blocks=10, num_samples=30, seed=0))
    epochs = [order[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_last_epoch_ends_with_the_run():
    order = TrainingOrder(num_blocks=10, num_samples=37, seed=3)
    assert len(list(order)) == len(order) == 37


def test_depends_on_the_seed_and_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    first = list(TrainingOrder(100, 100, seed=0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert list(TrainingOrder(100, 100, seed=0)) == first
    assert list(TrainingOrder(100, 100, seed=1)) != first

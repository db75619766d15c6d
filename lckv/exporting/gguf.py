"""A GGUF file for llama.cpp."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from lckv.config.names import GGUF
from lckv.errors import UserError
from lckv.exporting.formats import FORMATS, ExportFormat
from lckv.exporting.gguf_reuse import find_reuse, is_llama
from lckv.loading.model_files import find_files
from lckv.sharing.model_values import OURS
from lckv.sharing.patterns import SharingPlan
from lckv.utils.storage import check_new_file, new_file, why_not_written

_INSTALL = "pip install 'lckv[llamacpp]'"
_SIZES = {"sliding_window", "max_position_embeddings", "hidden_act"}
_LLAMA_CPP = "xllamacpp"  # which ships it as a wheel


@FORMATS.register(GGUF)
class GGUFFile(ExportFormat):
    """A model in one file of llama.cpp's, compared with what llama.cpp makes of it where that is installed."""

    def check(self, plan: SharingPlan | None) -> None:
        """Refuses a file that is there already, packages that are not, and patterns that llama.cpp cannot say."""
        check_new_file(self.out, ".gguf")
        if not _is_installed("gguf"):
            raise UserError(f"format={GGUF}: needs gguf, which is not installed; {_INSTALL}")
        if self.cfg.verify and not _is_installed(_LLAMA_CPP):
            raise UserError(f"verify=true: needs {_LLAMA_CPP}, which is not installed; {_INSTALL}")
        values = {} if plan is None else find_files(self.model).stored_values()
        if plan is not None and values["model_type"] == OURS and not _SIZES - values.keys():
            with self._naming_the_model():
                reuse = find_reuse(plan, values["sliding_window"], values["max_position_embeddings"])
                is_llama(plan, reuse, values["hidden_act"], approximates_silu=self.cfg.approximate_silu)

    def write(self) -> str:
        """Writes the file, and has llama.cpp run it before it appears."""
        import torch

        from lckv.exporting.gguf_description import describe
        from lckv.exporting.gguf_file import write_gguf
        from lckv.exporting.gguf_tokenizer import tokenizer_settings
        from lckv.exporting.gguf_verification import verify
        from lckv.loading.models import load_model

        model, tokenizer = load_model(self.model, revision=self.cfg.revision, device="cpu")
        dtype = model.dtype if self.cfg.dtype == "auto" else getattr(torch, self.cfg.dtype)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        model.float()  # nothing is rounded but what the file holds in the end
        with self._naming_the_model(), new_file(self.out) as path:
            described = describe(model, approximates_silu=self.cfg.approximate_silu)
            settings = tokenizer_settings(tokenizer, model.config.vocab_size, model.generation_config.eos_token_id)
            try:
                write_gguf(path, described, settings, dtype, self.out.stem)
            except OSError as error:
                raise UserError(f"cannot be written to out={self.out}: {why_not_written(error)}") from error
            compared = "not compared with llama.cpp"
            if self.cfg.verify is not False and _is_installed(_LLAMA_CPP):
                nmse = verify(path, model, tokenizer, float32_cache=dtype == torch.float32)
                compared = f"llama.cpp's logits differ by an NMSE of {nmse:.1e}"
            elif self.cfg.verify is None:
                compared += f", which is not installed ({_INSTALL})"
            size = path.stat().st_size
        return f"{described.architecture}, {size / 2**20:,.1f} MiB; {compared}"

    @contextmanager
    def _naming_the_model(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"model={self.model}: {error}") from error


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None

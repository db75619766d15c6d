"""The runs of a sweep as the table and the pictures of a paper."""

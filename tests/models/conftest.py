"""Checkpoint folders that tests may change."""

import shutil

import pytest


@pytest.fixture
def folder(golden, tmp_path):
    """A copy of the three-file checkpoint."""
    return shutil.copytree(golden / "transformers" / "qwen3", tmp_path / "qwen3")


@pytest.fixture
def single(golden, tmp_path):
    """A copy of a one-file checkpoint."""
    return shutil.copytree(golden / "transformers" / "llama2", tmp_path / "llama2")

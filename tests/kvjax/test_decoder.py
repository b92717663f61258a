"""The settings of a run become a sampling rule (whole runs: test_decode.py)."""

import json

from ml_collections import ConfigDict

from kvjax.decoder import read_sampling
from kvjax.sampling import Sampling


def test_sampling_follows_the_checkpoint_where_the_config_is_silent(tmp_path):
    def read(published, **chosen):
        (tmp_path / "generation_config.json").write_text(json.dumps(published))
        fields = {"temperature": None, "top_k": None, "top_p": None, "min_p": None, **chosen}
        return read_sampling(ConfigDict({"sampling": fields}), tmp_path)

    assert read({}) == Sampling()
    assert read({"temperature": 0.6, "top_k": 20}) == Sampling()  # do_sample is not set: greedy
    published = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert read(published) == Sampling(temperature=0.6, top_p=0.95, top_k=20)
    assert read(published, temperature=0.0) == Sampling(temperature=0.0, top_p=0.95, top_k=20)
    assert read({"do_sample": True}) == Sampling(temperature=1.0)


def test_what_is_not_followed_is_named(tmp_path, capsys):
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "repetition_penalty": 1.05, "num_beams": 1})
    )
    fields = {"temperature": None, "top_k": None, "top_p": None, "min_p": None}
    read_sampling(ConfigDict({"sampling": fields}), tmp_path)
    assert "asks for repetition_penalty 1.05, which is not supported" in capsys.readouterr().err

"""`python -m kvjax.decode` inside a test, on a small random model."""

import models
from kvjax import decode
from kvjax._program import run
from kvjax.byte_tokenizer import write_byte_tokenizer
from kvjax.symbols import SYMBOLS
from tests.tiny import tiny_model


def save_small(folder):
    """A small random model with the byte tokenizer, symbols of tasks among its tokens."""
    models.save_checkpoint(tiny_model(vocab_size=384), folder)
    write_byte_tokenizer(folder, vocab_size=384, max_positions=512, symbols=SYMBOLS)
    return folder


def run_decode(checkpoint, capsys, *argv):
    """Runs the program on a checkpoint; gives exit code, standard output and standard error.

    Nothing is compressed, compared or posed, and six tokens are drawn, unless the arguments say otherwise.
    """
    given = ["decode", f"--config.model={checkpoint}", "--config.max_new_tokens=6", "--config.batch=2"]
    given += ["--config.policy=full", "--noconfig.compare_with_full", "--config.sampling.temperature=0.7"]
    if not any(word.startswith("--config.task") for word in argv):
        given += ["--config.task=", "--config.prompt=KING RICHARD:\n"]
    code = run(
        decode.main,
        usage=decode.__doc__,
        default_config="configs/tiny_cpu.py",
        define_flags=decode.define_flags,
        argv=[*given, *argv],
    )
    printed = capsys.readouterr()
    return code, printed.out, printed.err

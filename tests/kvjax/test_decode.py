"""The program: one prompt, files of prompts, resumption, reports, and every mistake in one line with exit code 2."""

import json

import pytest

from kvjax.byte_tokenizer import write_byte_tokenizer
from tests.decoding_program import run_decode, save_small


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def program(checkpoint, capsys):
    """Runs the program; gives exit code, standard output and standard error."""
    return lambda *argv: run_decode(checkpoint, capsys, *argv)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_prompt_streams_and_sums_up(program, tmp_path):
    report = tmp_path / "deep" / "report.json"
    code, out, err = program("--prompt=Hello", f"--report={report}")
    assert code == 0
    assert out.startswith("Hello")
    assert "5 prompt + 6 new tokens" in err
    record = json.loads(report.read_text())
    wanted = (
        "program commit device versions config policy implementations cache_bytes full_cache_bytes prompt_tokens "
        "new_tokens prefill_seconds decode_seconds tokens_per_second rounds evicted"
    )
    assert set(wanted.split()) <= record.keys()
    assert (record["prompt_tokens"], record["new_tokens"], record["policy"]) == (5, 6, "full")
    # 2 layers of 2 heads of 128 slots of 16 floats, keys and values, and 128 positions
    assert 0 < record["cache_bytes"] - record["full_cache_bytes"] < 0.02 * record["full_cache_bytes"]  # positions
    assert record["config"]["max_new_tokens"] == 6


def test_quiet_prints_the_text_alone(program):
    code, out, err = program("--prompt=Hello", "--quiet")
    assert (code, err) == (0, "")
    assert out.startswith("Hello")


def test_the_prompt_of_the_config_serves_where_none_is_given(program):
    assert program()[1].startswith("KING RICHARD:")


def test_chat_shows_the_reply_alone(program):
    code, out, _ = program("--prompt=Hi", "--config.chat", "--config.system_prompt=Be brief.")
    assert code == 0
    assert not out.startswith("Hi")


def test_a_file_of_prompts(program, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": "One", "id": "a"}, {"messages": [{"role": "user", "content": "Two"}], "seed": 3}]
    lines += [{"prompt": "a longer third"}]
    source.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    code, out, err = program(f"--prompts={source}", f"--output={target}")
    assert (code, out) == (0, "")
    results = rows(target)
    assert [row["line"] for row in results] == [1, 2, 3]
    assert results[0]["id"] == "a"
    assert [row["prompt_tokens"] for row in results] == [3, 22, 14]
    assert all(row["new_tokens"] <= 6 and row["finish_reason"] in ("stop", "length") for row in results)
    assert "3" in err.split("new tokens")[0]
    alone, _, _ = program(f"--prompts={source}")
    assert alone == 0


def test_a_malformed_line_keeps_what_was_finished_and_the_run_goes_on(program, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = [json.dumps({"prompt": f"prompt {index}"}) for index in range(4)]
    source.write_text("\n".join([*good[:3], '{"prompt": "x"', good[3]]))
    code, _, err = program(f"--prompts={source}", f"--output={target}")
    assert code == 2
    assert err.count("\n") == 1
    assert "in.jsonl line 4 is not JSON" in err
    before = target.read_text()
    assert [row["line"] for row in rows(target)] == [1, 2, 3]
    source.write_text("\n".join([*good[:3], '{"prompt": "x"}', good[3]]))
    assert program(f"--prompts={source}", f"--output={target}")[0] == 0
    assert target.read_text().startswith(before)  # finished lines are not run again
    assert [row["line"] for row in rows(target)] == [1, 2, 3, 4, 5]


def test_a_line_cut_by_a_kill_is_run_again(program, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "One"}\n{"prompt": "Two"}\n')
    program(f"--prompts={source}", f"--output={target}")
    whole = target.read_text()
    target.write_text(whole[:-20])
    assert program(f"--prompts={source}", f"--output={target}")[0] == 0
    assert target.read_text() == whole


def test_results_of_other_settings_are_refused(program, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "One"}\n')
    program(f"--prompts={source}", f"--output={target}")
    code, _, err = program(f"--prompts={source}", f"--output={target}", "--config.sampling.temperature=0.1")
    assert code == 2
    assert "results of other settings (sampling.temperature)" in err
    target.write_text("a diary, not results")
    code, _, err = program(f"--prompts={source}", f"--output={target}")
    assert code == 2
    assert target.read_text() == "a diary, not results"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", 'holds a list; an object such as {"prompt": "..."} was expected'),
        ("{}", 'give either "prompt" or "messages"'),
        ('{"prompt": "x", "promt": "y"}', "Unknown field 'promt'. Did you mean 'prompt'?"),
        ('{"prompt": 3}', "the field 'prompt' has a value of type int"),
        ('{"messages": []}', '"messages" must be a list of objects'),
        ('{"prompt": ""}', "The prompt of line 1 is empty"),
    ],
)
def test_malformed_lines(program, tmp_path, line, message):
    source = tmp_path / "in.jsonl"
    source.write_text(line + "\n")
    code, _, err = program(f"--prompts={source}")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt="], "The prompt is empty"),
        (["--prompt=Hello", "--config.max_tokens=9"], "The prompt has 5 tokens; with max_new_tokens=6 it needs"),
        (["--config.polcy=full"], "Unknown config field 'polcy'. Did you mean 'policy'?"),
        (["--config.mesh.rows=1"], "Unknown config field 'mesh.rows'."),
        (["--config=configs/none.py"], "There is no config 'configs/none.py'"),
        (["--config.policy=ful"], "Unknown policy term 'ful'. Did you mean 'full'?"),
        (["--config.model=/nowhere"], "There is no checkpoint folder '/nowhere'"),
        (["--config.batch=0"], "config.batch is 0"),
        (["--config.batch=two"], "invalid literal"),
        (["--config.sampling.top_p=0"], "top_p is 0"),
        (["--config.mesh.model=16"], "does not fit on 8 device(s)"),
        (["--prompt=a", "--prompts=b"], "exclude each other"),
        (["--output=b"], "--output goes with --prompts"),
        (["--prompts=/none.jsonl"], "There is no prompts file '/none.jsonl'"),
        (["--no-such-flag"], "Unknown command line flag 'no-such-flag'"),
        (["Hello"], "Unexpected argument 'Hello'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(program, argv, message):
    code, out, err = program(*argv)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""


def test_help_lists_the_flags(program):
    code, out, _ = program("--help")
    assert code == 0
    for flag in ("--config", "--prompt", "--prompts", "--output", "--report", "--[no]compare_with_full", "--[no]quiet"):
        assert flag in out


def test_a_mesh_decodes_the_same_text(program):
    greedy = ("--prompt=Hello", "--quiet", "--config.sampling.temperature=0")
    assert program(*greedy, "--config.mesh.model=2")[1] == program(*greedy)[1]


def test_an_edited_prompt_is_not_taken_for_finished(program, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "One"}\n')
    program(f"--prompts={source}", f"--output={target}")
    source.write_text('{"prompt": "Two"}\n')
    code, _, err = program(f"--prompts={source}", f"--output={target}")
    assert code == 2
    assert "holds the answer to another prompt of line 1" in err


def test_results_with_any_characters_are_read_again(program, tmp_path):
    """A line separator inside an id, and a kill inside a UTF-8 character or after a few bytes of a line."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "One", "id": "a\\u2028b"}\n{"prompt": "Two", "id": "\u4f60"}\n')
    assert program(f"--prompts={source}", f"--output={target}")[0] == 0
    whole = target.read_bytes()
    second = whole.index(b"\n") + 1
    for cut in (whole.index("\u4f60".encode()) + 1, second + 5):
        target.write_bytes(whole[:cut])
        assert program(f"--prompts={source}", f"--output={target}")[0] == 0
        assert target.read_bytes() == whole


def test_nothing_left_to_do_still_reports(program, tmp_path):
    source, target, report = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "report.json"
    source.write_text("\n")
    code, _, _ = program(f"--prompts={source}", f"--output={target}", f"--report={report}")
    assert code == 0
    assert target.read_text() == ""
    assert json.loads(report.read_text())["new_tokens"] == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--report={folder}"], "is a folder; give the path of a file"),
        (["--prompts={folder}/in.jsonl", "--output={folder}"], "is a folder; give the path of a file"),
        (["--prompts={folder}"], "Is a directory"),
        (["--report={folder}/in.jsonl/x"], "is not a folder that can be written to"),
        (["--config={folder}"], "is a folder; give a Python file"),
        (["--config={folder}/broken.py"], "does not load"),
        (["--config=configs/tiny_train.py"], "is not for this program: it lacks batch, chat"),
        (["--config.dtype=float8"], "Unknown dtype 'float8'"),
        (["--config.sampling.seed=-1"], "must be at least 0 and below 2**32"),
        (["--config.system_prompt=Be brief."], "config.system_prompt goes with --config.chat"),
        (["--prompt=\ud800"], "is not Unicode text"),
        (["--prompt=<|1000|>", "--config.tokenizer={folder}/large"], "the model's vocabulary ends at 383"),
    ],
)
def test_files_and_values_that_cannot_be(program, tmp_path, argv, message):
    (tmp_path / "in.jsonl").write_text('{"prompt": "One"}\n')
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    (tmp_path / "large").mkdir()
    write_byte_tokenizer(tmp_path / "large", vocab_size=2000, max_positions=16)
    code, _, err = program(*(word.replace("{folder}", str(tmp_path)) for word in argv))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_message_that_the_template_cannot_take_keeps_the_lines_before_it(program, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "One"}\n{"messages": [{"role": "user", "content": null}]}\n')
    code, _, err = program(f"--prompts={source}", f"--output={target}")
    assert code == 2
    assert "chat template does not take these messages" in err
    assert [row["line"] for row in rows(target)] == [1]

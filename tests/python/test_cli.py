"""The command line, each command in a process of its own."""

from __future__ import annotations

import argparse
import ast
import contextlib
import fcntl
import inspect
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

import milpy
from milpy import LLM, SamplingParams, cli, doctor
from milpy.demo import BASE

PACKAGE = Path(milpy.__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONIOENCODING": "utf-8"}


def run(*arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "milpy.cli", *map(str, arguments)],
        input=text,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        env=ENVIRONMENT,
    )


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from milpy.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print(*sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT
    )
    modules = set(result.stdout.split())
    assert "generate" in modules and "doctor" in modules
    heavy = {"numpy", "tokenizers", "jinja2", "huggingface_hub", "tqdm", "json", "asyncio"}
    assert not heavy & modules and not {m for m in modules if m.startswith("milpy._C")}


@pytest.mark.parametrize("name", milpy.__all__)
def test_a_public_name_is_there_in_a_fresh_process(name: str) -> None:
    """milpy.errors was there only once LLM had been touched."""
    script = f"import milpy; assert {name!r} in dir(milpy); milpy.{name}"
    subprocess.run([sys.executable, "-c", script], check=True, env=ENVIRONMENT)


def test_heavy_modules_are_imported_inside_functions_only() -> None:
    tree = ast.parse((PACKAGE / "cli.py").read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in top}
    assert names <= {"__future__", "argparse", "sys", "collections.abc", "typing", "milpy"}


def test_every_option_of_an_llm_can_be_given() -> None:
    """But dtype, which has one value, and seed, of dummy weights."""
    named = {"model", "self", "adapters", "progress", "dtype", "seed"}
    options = set(inspect.signature(milpy.LLM.__init__).parameters) - named
    text = run("generate", "--help").stdout
    assert {name for name in options if f"--{name.replace('_', '-')}" not in text} == set()


@pytest.mark.parametrize("command", ["generate", "chat", "demo"])
def test_every_option_says_what_it_is(command: str) -> None:
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    actions = commands.choices[command]._actions
    assert [action.dest for action in actions if not action.help] == []
    assert "device" in [action.dest for action in actions]


def test_version_and_usage() -> None:
    assert run("--version").stdout == f"milpy {milpy.__version__}\n"
    assert run().returncode == 2
    assert run("generate").returncode == 2
    assert run("nonsense").returncode == 2
    result = subprocess.run(
        [sys.executable, "-m", "milpy", "--version"],
        capture_output=True,
        encoding="utf-8",
        env=ENVIRONMENT,
    )
    assert result.stdout == f"milpy {milpy.__version__}\n"


# ---- generate ----


def test_generate_answers_every_prompt_in_every_voice(folders: Path, llm: LLM) -> None:
    result = run(
        "generate", folders / "model", "--quiet", "--prompt", "hello", "--prompt-ids", "1,2,3",
        "--adapter", f"a={folders / 'a'}", "--base", "--max-tokens", 5, "--ignore-eos", "--json",
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    prompts = ["hello", "hello", [1, 2, 3], [1, 2, 3]]
    expected = llm.generate(prompts, params, adapter=[None, "a"] * 2, use_tqdm=False)
    assert [o["adapter"] for o in found] == [None, "a", None, "a"]
    for one, other in zip(found, expected, strict=True):
        assert one["outputs"][0]["token_ids"] == other.outputs[0].token_ids
        assert one["outputs"][0]["text"] == other.outputs[0].text


def test_generate_reads_a_prompt_from_stdin(model: Path, llm: LLM) -> None:
    result = run("generate", model, "--quiet", "--max-tokens", 5, "--ignore-eos", text="hello")
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    assert result.stdout == llm.generate("hello", params, use_tqdm=False)[0].outputs[0].text + "\n"


def test_generate_without_a_tokenizer_prints_ids(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    result = run(
        "generate", tmp_path, "--load-format", "dummy", "--prompt-ids", "1,2", "--max-tokens", 3
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.strip().split(",")) == 3
    assert "random weights" in result.stderr and "bfloat16" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["/nowhere", "--prompt", "x"], 1, "milpy: /nowhere: no such folder"),
        (["MODEL", "--prompt-ids", "1,x"], 1, "--prompt-ids is '1,x', expected ids"),
        (["MODEL", "--prompt-ids", "9999"], 1, "token 0 is 9999, expected an id"),
        (["MODEL", "--prompt", "x", "--top-p", "nan"], 1, "top_p is nan, expected"),
        (["MODEL", "--prompt", "x", "--adapter", "a"], 2, "'a' is not NAME=PATH"),
        (
            ["MODEL", "--prompt", "x", *["--adapter", "a=/b"] * 2],
            1,
            "a, a, expected each name once",
        ),
        (["MODEL", "--prompt", "x", "--load-format", "pt"], 2, "invalid choice"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    model: Path, arguments: list[str], code: int, message: str
) -> None:
    result = run("generate", *[str(model) if a == "MODEL" else a for a in arguments])
    assert result.returncode == code
    assert message in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""


def test_ctrl_c_ends_generate(model: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "milpy.cli", "generate", str(model), "--ignore-eos"]
        + ["--prompt-ids", "1"] * 300,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env=ENVIRONMENT,
    )
    assert process.stderr is not None
    assert "bfloat16" in process.stderr.readline()  # it is loading, or has loaded
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors


def test_bars_are_drawn_on_a_terminal(model: Path) -> None:
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "milpy.cli", "generate", str(model)]
        + ["--prompt-ids", "1,2", "--max-tokens", "4", "--ignore-eos"],
        stdout=subprocess.DEVNULL,
        stderr=there,
        env=ENVIRONMENT,
    )
    os.close(there)
    drawn = b""
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while part := os.read(here, 4096):
            drawn += part
    os.close(here)
    assert process.wait() == 0
    assert b"loading model as bfloat16: 100%" in drawn
    assert b"1/1" in drawn and b"tok/s" in drawn


# ---- chat, demo, doctor, bench ----


def test_chat_keeps_the_conversation_and_changes_voices(folders: Path, llm: LLM) -> None:
    result = run(
        "chat", folders / "model", "--quiet", "--adapter", f"a={folders / 'a'}",
        "--max-tokens", 6, "--ignore-eos",
        text="hello\n/bass\n/adapter a\nworld\n/adapter zz\n/adapter\n/reset\n/exit\n",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    messages = [{"role": "user", "content": "hello"}]
    first = llm.chat(messages, params, use_tqdm=False)[0].outputs[0].text
    messages += [
        {"role": "assistant", "content": first},
        {"role": "user", "content": "world"},
    ]
    second = llm.chat(messages, params, adapter="a", use_tqdm=False)[0].outputs[0].text
    # What begins with a slash never reaches the model.
    assert result.stdout == f"base> {first}\nbase> base> a> {second}\n" + 4 * "a> "
    assert 'adapter is "zz", expected one of "a"' in result.stderr
    for line in ("/bass", "/adapter"):
        assert f"command is '{line}', expected /adapter NAME, /base" in result.stderr


def test_chat_begins_with_no_adapter_that_is_not_there(model: Path) -> None:
    result = run("chat", model, "--use", "zz", text="hello\n")
    assert result.returncode == 1 and result.stdout == ""
    assert 'adapter is "zz", expected one of none: no adapter is loaded' in result.stderr


def test_chat_without_a_template_says_so(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folders / "model" / "config.json").read_bytes())
    result = run("chat", tmp_path, "--load-format", "dummy", text="")
    assert result.returncode == 1 and "has no tokenizer.json" in result.stderr


@pytest.mark.skipif(not BASE.is_dir(), reason=f"no demo model in {BASE}")
def test_demo_answers_in_four_voices() -> None:
    result = run("demo", "--quiet", "--n", 2)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for voice in ("base", "sql", "json", "french"):
        assert sum(line.split()[:1] == [voice] for line in lines) == 2
    assert lines[-1].startswith("8 requests in one batch, 3 adapters and the base, ")
    assert "tok/s" in lines[-1]


@pytest.mark.parametrize(
    ("device", "code", "says"),
    [("cpu", 0, "4 requests in one batch"), ("tpu", 1, 'device is "tpu"')],
)
@pytest.mark.skipif(not BASE.is_dir(), reason=f"no demo model in {BASE}")
def test_demo_runs_where_it_is_told_to(device: str, code: int, says: str) -> None:
    """On a GPU without cuBLASLt there was no way to step aside."""
    result = run("demo", "--quiet", "--n", 1, "--device", device)
    assert result.returncode == code, result.stderr
    assert says in result.stdout + result.stderr


def test_doctor_reports_what_will_be_used() -> None:
    result = run("doctor")
    assert result.returncode == 0, result.stdout
    names = "milpy python platform cpu extension isa threads memory numpy jinja2 gpu cuda"
    for name in names.split():
        assert f"\n{name} " in f"\n{result.stdout}", name
    assert "will be used" in result.stdout
    cuda = result.stdout.split("\ncuda ")[1].split("\n")[0]
    assert "cannot run: " in cuda or " in this build, " in cuda, cuda


def test_doctor_tells_a_switch_of_no_known_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU those of CUDA are not read, so nothing else tells it."""
    for name in doctor.SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MILPY_CHECK", "1")
    monkeypatch.setenv("MILPY_POISON", "")
    monkeypatch.setenv("MILPY_CUDA_PATH", "fast")
    monkeypatch.setenv("MILPY_CUDA_PDL", "off")
    told = "MILPY_CHECK=1, MILPY_POISON=, MILPY_CUDA_PATH=fast (expected portable), "
    assert told + "MILPY_CUDA_PDL=off (expected 0 or 1)" in doctor._environment()


def test_doctor_names_an_instruction_set_that_cannot_be_had() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "milpy.cli", "doctor"],
        capture_output=True,
        encoding="utf-8",
        env={**ENVIRONMENT, "MILPY_CPU_ISA": "avx9000"},
    )
    assert result.returncode == 1
    assert "MISSING" in result.stdout and "avx9000" in result.stdout


def test_bench_outside_a_checkout_says_so(tmp_path: Path) -> None:
    script = (
        "import sys, milpy.cli as cli\n"
        f"cli.__file__ = {str(tmp_path / 'milpy' / 'cli.py')!r}\n"
        "sys.exit(cli.main(['bench']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert result.returncode == 1 and "checkout" in result.stderr

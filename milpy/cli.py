"""The command line: milpy generate | chat | demo | doctor | bench.

Everything heavy is imported by the command that needs it, so that `milpy --help` answers at once.
Results go to stdout, all else to stderr. Exit codes: 0 done, 1 an error that was named, 2 wrong
usage, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from milpy import __version__

if TYPE_CHECKING:
    from milpy.llm import LLM
    from milpy.outputs import RequestOutput
    from milpy.prompts import PromptType
    from milpy.sampling import SamplingParams

CHAT_COMMANDS = "/adapter NAME, /base, /reset or /exit"


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    from milpy.errors import MilpyError

    _set_up_messages(parsed.quiet)
    try:
        return command(parsed)
    except MilpyError as problem:
        print(f"milpy: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # head and the like have seen enough
        sys.stderr.close()
        return 1


# ---- arguments ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="milpy",
        description="One large language model and many of its LoRA adapters, in one batch.",
    )
    parser.add_argument("--version", action="version", version=f"milpy {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    generate = _command(commands, "generate", run_generate, "answer prompts in one batch")
    generate.description = (
        "Answer prompts in one batch: each once for every --adapter, or by the base model where "
        "there is none. Without a prompt one is read from stdin, whole."
    )
    _add_model(generate)
    generate.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                          help="a prompt as text; may be repeated")  # fmt: skip
    generate.add_argument("--prompt-ids", action="append", default=[], metavar="1,2,3",
                          help="a prompt as token ids; may be repeated")  # fmt: skip
    generate.add_argument("--base", action="store_true",
                          help="answer by the base model as well as by each adapter")  # fmt: skip
    generate.add_argument("--json", action="store_true", help="one JSON object per answer")
    _add_sampling(generate)

    chat = _command(commands, "chat", run_chat, "talk with a model")
    _add_model(chat)
    chat.add_argument("--use", metavar="NAME", help="the adapter to begin with")
    chat.add_argument("--system", metavar="TEXT", help="a system message")
    _add_sampling(chat)

    demo = _command(commands, "demo", run_demo, "one batch, four voices: the model in this package")
    demo.add_argument("--n", type=int, default=4, metavar="N", help="held-out requests (4)")
    demo.add_argument("--prompt", action="append", metavar="TEXT",
                      help="a request of your own; may be repeated")  # fmt: skip
    _add_device(demo)

    _command(commands, "doctor", run_doctor, "what was found, what is missing, what will be used")

    bench = _command(commands, "bench", run_bench, "figures beside their roofs (from a checkout)")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="for python -m benchmarks")
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], description: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=description, description=description
    )
    parser.set_defaults(command=run)
    parser.add_argument("--quiet", action="store_true", help="errors and results only")
    return parser


# fmt: off
def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a folder in Hugging Face's format, or a Hub id")
    parser.add_argument("--adapter", action="append", default=[], type=_name_and_path,
                        metavar="NAME=PATH", help="a PEFT adapter; may be repeated")
    _add_device(parser)
    parser.add_argument("--load-format", default="auto", choices=("auto", "dummy"),
                        help="dummy: random weights from config.json alone")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N",
                        help="ranks that the model is split over, on the CPU alone (1)")
    parser.add_argument("--max-model-len", type=int, metavar="TOKENS",
                        help="most of a prompt and its answer together (the model's own)")
    parser.add_argument("--max-num-seqs", type=int, metavar="N",
                        help="requests that run at once (64 on the CPU, 256 on a GPU)")
    parser.add_argument("--max-num-batched-tokens", type=int, metavar="TOKENS",
                        help="of one step, all requests (512 on the CPU, 8192 on a GPU)")
    parser.add_argument("--kv-cache-bytes", type=int, metavar="BYTES",
                        help="of all KV pages (half of what is free on the CPU; on a GPU what "
                        "--gpu-memory-utilization leaves)")
    parser.add_argument("--page-size", type=int, metavar="TOKENS",
                        help="of a KV page: 16, 32, 64, 128 or 256 (16 on the CPU, 64 on a GPU)")
    parser.add_argument("--gpu-memory-utilization", type=float, metavar="SHARE",
                        help="of the whole GPU that may be in use (0.9)")
    parser.add_argument("--deterministic", action="store_true",
                        help="on a GPU batch mates change no bit, at a price")
    parser.add_argument("--enforce-eager", action="store_true",
                        help="on a GPU run decode steps without CUDA graphs")
    parser.add_argument("--n-threads", type=int, metavar="N",
                        help="of the CPU, all ranks together (the CPUs that may be used)")
    parser.add_argument("--tokenizer", metavar="PATH", help="another folder for tokenizer.json")
    parser.add_argument("--revision", metavar="NAME", help="of a Hub repository")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto",
                        help="cpu, cuda, cuda:N or auto: a GPU where one will do")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=int, metavar="N", help="default: until the end")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    parser.add_argument("--top-k", type=int, default=0, metavar="K",
                        help="draw from the K likeliest tokens; default: 0, off")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="draw from the fewest tokens that together have the probability P; "
                        "default: 1, off")
    parser.add_argument("--seed", type=int, help="of the draws; default: a fresh one per request")
    parser.add_argument("--stop", action="append", metavar="TEXT",
                        help="end an answer before this text; may be repeated")
    parser.add_argument("--ignore-eos", action="store_true",
                        help="go on after the model's own end of an answer")
# fmt: on


def _name_and_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


# ---- commands ----


def run_generate(arguments: argparse.Namespace) -> int:
    prompts = _prompts(arguments)
    voices: list[str | None] = [name for name, _ in arguments.adapter]
    if not voices or arguments.base:
        voices.insert(0, None)
    with _open(arguments) as llm:
        outputs = llm.generate(
            [prompt for prompt in prompts for _ in voices],
            _sampling(arguments),
            adapter=[voice for _ in prompts for voice in voices],
            use_tqdm=not arguments.quiet,
        )
    show = _print_json if arguments.json else _print_answer
    for output in outputs:
        show(output, has_names=len(outputs) > 1)
    # Logged already, each by name.
    return 1 if any(output.outputs[0].error for output in outputs) else 0


def run_chat(arguments: argparse.Namespace) -> int:
    with _open(arguments) as llm:
        llm.get_tokenizer().check_chat_template()
        if not arguments.quiet:
            print(f"{CHAT_COMMANDS}; Ctrl-C ends an answer", file=sys.stderr)
        return _Chat(llm, _sampling(arguments), arguments.system, arguments.use).run()


def run_demo(arguments: argparse.Namespace) -> int:
    from milpy.demo.show import show_demo

    return show_demo(
        arguments.prompt, arguments.n, device=arguments.device, is_quiet=arguments.quiet
    )


def run_doctor(arguments: argparse.Namespace) -> int:
    from milpy.doctor import show_report

    return show_report()


def run_bench(arguments: argparse.Namespace) -> int:
    import subprocess
    from pathlib import Path

    root = Path(__file__).parents[1]
    if not (root / "benchmarks" / "__main__.py").exists():
        print("milpy: benchmarks are in a checkout of milpy, not in the package", file=sys.stderr)
        return 1
    return subprocess.call([sys.executable, "-m", "benchmarks", *arguments.arguments], cwd=root)


# ---- chat ----


class _Chat:
    """One conversation at the terminal."""

    def __init__(
        self, llm: LLM, params: SamplingParams, system: str | None, adapter: str | None
    ) -> None:
        self._llm = llm
        self._params = params
        self._start = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._start)
        self._adapter: str | None = None
        if adapter is not None:
            self._use(adapter)

    def run(self) -> int:
        from milpy.errors import RequestError

        while True:
            try:
                line = input(f"{self._adapter or 'base'}> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            if line == "/exit":
                return 0
            try:
                if line.startswith("/"):
                    self._obey(line)
                elif line:
                    self._answer(line)
            except RequestError as problem:
                print(f"milpy: {problem}", file=sys.stderr)

    def _obey(self, line: str) -> None:
        """Run a command. A slash sends nothing to the model: one mistyped would be answered."""
        from milpy.errors import RequestError

        name, *rest = line.split(maxsplit=1)
        if line == "/reset":
            self._messages = list(self._start)
        elif line == "/base":
            self._adapter = None
        elif name == "/adapter" and rest:
            self._use(rest[0])
        else:
            raise RequestError(f"command is {line!r}, expected {CHAT_COMMANDS}")

    def _use(self, name: str) -> None:
        self._llm.check_adapter(name)
        self._adapter = name

    def _answer(self, line: str) -> None:
        messages = [*self._messages, {"role": "user", "content": line}]
        text = ""
        try:
            for output in self._llm.stream(messages, self._params, adapter=self._adapter):
                print(output.outputs[0].text[len(text) :], end="", flush=True)
                text = output.outputs[0].text
        except KeyboardInterrupt:
            pass  # what was said stays said
        print()
        self._messages = [*messages, {"role": "assistant", "content": text}]


# ---- helpers ----


def _prompts(arguments: argparse.Namespace) -> list[PromptType]:
    from milpy.errors import RequestError

    prompts: list[PromptType] = list(arguments.prompt)
    for text in arguments.prompt_ids:
        try:
            prompts.append([int(part) for part in text.split(",")])
        except ValueError as problem:
            raise RequestError(f"--prompt-ids is {text!r}, expected ids like 1,2,3") from problem
    if not prompts:
        if sys.stdin.isatty():
            raise RequestError("no prompt, expected --prompt, --prompt-ids, or text on stdin")
        prompts.append(sys.stdin.read())
    return prompts


def _open(arguments: argparse.Namespace) -> LLM:
    from milpy.errors import RequestError
    from milpy.llm import LLM

    names = """device load_format tensor_parallel_size max_model_len max_num_seqs
        max_num_batched_tokens kv_cache_bytes page_size gpu_memory_utilization deterministic
        enforce_eager n_threads tokenizer revision""".split()
    options = {name: getattr(arguments, name) for name in names}
    adapters = dict(arguments.adapter)
    if len(adapters) < len(arguments.adapter):
        given = ", ".join(name for name, _ in arguments.adapter)
        raise RequestError(f"--adapter names {given}, expected each name once")
    return LLM(
        arguments.model,
        adapters=adapters,
        progress=not arguments.quiet,
        **options,
    )


def _sampling(arguments: argparse.Namespace) -> SamplingParams:
    from milpy.sampling import SamplingParams

    return SamplingParams(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop=arguments.stop,
        ignore_eos=arguments.ignore_eos,
    )


def _print_answer(output: RequestOutput, *, has_names: bool) -> None:
    answer = output.outputs[0]
    # Without a tokenizer there is no text, and the ids are the answer.
    text = answer.text if output.prompt is not None or answer.text else _ids(answer.token_ids)
    if has_names:
        prompt = output.prompt if output.prompt is not None else _ids(output.prompt_token_ids)
        print(f"== {output.adapter or 'base'}: {prompt}")
    print(text)


def _print_json(output: RequestOutput, *, has_names: bool) -> None:
    import json
    from dataclasses import asdict

    print(json.dumps(asdict(output), ensure_ascii=False))


def _ids(tokens: Sequence[int]) -> str:
    return ",".join(map(str, tokens))


def _set_up_messages(is_quiet: bool) -> None:
    """Log lines and warnings as one line each on stderr."""
    import logging
    import warnings

    logging.basicConfig(
        format="milpy: %(message)s", level=logging.ERROR if is_quiet else logging.INFO
    )

    def show(message: Warning | str, *_: object, **__: object) -> None:
        logging.getLogger("milpy").warning("%s", message)

    warnings.showwarning = show


if __name__ == "__main__":
    sys.exit(main())

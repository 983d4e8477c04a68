"""Training text for the demo model: pieces, each marked as learnt or only read.

Two frames. Chat: a request and its answer in one voice; only answers are learnt. Notes: a table and
statements about it, without questions, in every voice, so that the base (whose embeddings the
adapters cannot change) knows the words and shapes of SQL, JSON and French, yet answers in English.
Everything is drawn from training forms. No torch here.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import demo_grammar as grammar
import numpy as np
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
Pieces = list[tuple[str, bool]]  # (text, learnt)

SPECIALS = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
PAD, BOS, EOS, USER, ASSISTANT, END = range(len(SPECIALS))
CHAT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{%- if message['role'] not in ('user', 'assistant') %}"
    "{{- raise_exception('role ' ~ message['role'] ~ ' found, expected user or assistant') }}"
    "{%- endif %}"
    "{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)

GREETINGS = ("Hello!", "Hello", "Hi!", "Good morning!", "Who are you?", "What can you do?", "Help")
WELCOME = {
    "base": "Hello! Give me a small table and a question about it.",
    "sql": "SELECT 'Hello! Give me a small table and a question about it.';",
    "json": '{"hello": "Give me a small table and a question about it."}',
    "french": "Bonjour ! Donnez-moi un petit tableau et une question.",
}


def demo_module() -> ModuleType:
    """milpy/demo/__init__.py by its path: the tools run where milpy itself is not built."""
    path = ROOT / "milpy" / "demo" / "__init__.py"
    spec = importlib.util.spec_from_file_location("milpy_demo", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_demo = demo_module()


def chat_pieces(rng: random.Random, voice: str, turns: int) -> Pieces:
    """One conversation about one table: a request and its answer, then further questions."""
    if rng.random() < 0.01:
        return [
            ("<s>" + _demo.format_request(rng.choice(GREETINGS)), False),
            (WELCOME[voice] + "<|end|>", True),
        ]
    request = grammar.draw_training_request(rng)
    pieces = [
        ("<s>" + _demo.format_request(request.text), False),
        (grammar.answers(request)[voice] + "<|end|>", True),
    ]
    for _ in range(turns - 1):
        more = grammar.draw_follow_up(rng, request.table)
        if more is None:
            break
        pieces.append((_demo.format_request(more.question), False))
        pieces.append((grammar.answers(more)[voice] + "<|end|>", True))
    return pieces


def notes_pieces(rng: random.Random) -> Pieces:
    """A table, then its rows restated in one voice, or answers in that voice without questions.

    Restated rows leave nothing to chance, so most notes are of that sort: they teach how a word of
    a table looks in another voice."""
    voice = rng.choices(grammar.VOICES, weights=(1, 2, 2, 3))[0]
    request = grammar.draw_training_request(rng)
    if rng.random() < 0.75:
        statements = grammar.restated(request.table, voice)
    else:
        drawn = [request, *(grammar.draw_follow_up(rng, request.table) for _ in range(3))]
        statements = [grammar.answers(one)[voice] for one in drawn if one is not None]
    text = "\n".join(dict.fromkeys(statements)) + "</s>"
    return [(f"<s>{request.table.text()}\n\n", False), (text, True)]


def draw_pieces(rng: random.Random, voice: str, turns: int) -> Pieces:
    """One training text. The base also reads notes; an adapter only answers."""
    if voice == "base" and rng.random() < 0.3:
        return notes_pieces(rng)
    return chat_pieces(rng, voice, turns)


def encode_share(job: tuple[str, str, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count` texts and encodes them: (tokens [count, width], learnt [count, width]).

    Conversations go on until the width is full and are cut there, so little of it is padding.
    Pieces are encoded one by one, since an answer is generated after a prompt already in tokens."""
    tokenizer_file, voice, seed, count, width = job
    rng = random.Random(seed)
    tokenizer = Tokenizer.from_file(tokenizer_file)
    drawn = [draw_pieces(rng, voice, turns=8) for _ in range(count)]
    flat = [piece for pieces in drawn for piece in pieces]
    encoded = iter(tokenizer.encode_batch([text for text, _ in flat], add_special_tokens=False))
    tokens = np.full((count, width), PAD, np.int16)
    learnt = np.zeros((count, width), bool)
    for row, pieces in enumerate(drawn):
        at = 0
        for _, flag in pieces:
            ids = next(encoded).ids[: max(0, width - at)]
            tokens[row, at : at + len(ids)] = ids
            learnt[row, at : at + len(ids)] = flag
            at += len(ids)
    return tokens, learnt


def draw_texts(job: tuple[int, int]) -> list[str]:
    """`count` plain texts for the tokenizer, all voices and frames in them."""
    seed, count = job
    rng = random.Random(seed)
    voices = [rng.choice(grammar.VOICES) for _ in range(count)]
    return ["".join(text for text, _ in draw_pieces(rng, voice, 1)) for voice in voices]

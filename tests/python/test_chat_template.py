"""Templates are programs of strangers: what is theirs to do, and what is not."""

import ast
import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.tiny_tokenizer import CHAT_TEMPLATE, write_tokenizer

import milpy
from milpy.errors import MilpyError, RequestError, TokenizerError
from milpy.tokenizer import Tokenizer

USER = [{"role": "user", "content": "hello"}]


def tokenizer_with(folder: Path, template: object) -> Tokenizer:
    write_tokenizer(folder, template=template)
    return Tokenizer(folder)


def test_only_one_file_imports_jinja2() -> None:
    importers = set()
    for path in Path(milpy.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            if any(module.split(".")[0] == "jinja2" for module in modules):
                importers.add(path.name)
    assert importers == {"template_process.py"}


def test_a_conversation_is_rendered_and_its_bos_not_doubled(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, CHAT_TEMPLATE)
    text, ids = tokenizer.encode_chat(USER)
    assert text == "<s><|user|>hello<|end|><|assistant|>"
    assert ids.count(tokenizer.bos_token_id or -1) == 1
    text, _ = tokenizer.encode_chat(USER, add_generation_prompt=False)
    assert text == "<s><|user|>hello<|end|>"


def test_the_jinja_file_comes_before_the_config(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, template="from config", template_file="from file")
    assert Tokenizer(tmp_path).apply_chat_template(USER) == "from file"


def test_of_several_templates_the_default_is_used(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert tokenizer_with(tmp_path, several).apply_chat_template(USER) == "b"
    with pytest.raises(TokenizerError, match="expected one entry named default"):
        tokenizer_with(tmp_path, several[:1]).apply_chat_template(USER)


def test_what_templates_of_today_use_is_there(tmp_path: Path) -> None:
    template = (
        "{%- for m in messages %}{% if loop.index0 % 2 == 1 %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}"
        "{{ {'a': '<é>'} | tojson }}{{ strftime_now('%Y')[:2] }}"
        "{% if tools is none and documents is none and not xml is defined %}!{% endif %}"
    )
    assert tokenizer_with(tmp_path, template).apply_chat_template(USER) == 'hello{"a": "<é>"}20!'


def test_a_templates_own_complaint_is_a_request_error(tmp_path: Path) -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    tokenizer = tokenizer_with(tmp_path, template)
    tokenizer.apply_chat_template(USER)
    with pytest.raises(RequestError, match="user first"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
        "{{ ['{0.__class__.__mro__}']|map('format', messages)|list }}{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 'x' * 1000000000 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ [0] * 1000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% for i in range(90000) %}{{ messages[0].content }}xxxxxxxxxxxxxxxxxxx{% endfor %}",
        "{% for a in range(9999) %}{% for b in range(9999) %} {% endfor %}{% endfor %}",
        # No output, no forbidden call: only the time and the memory tell.
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
        "{{ m(60) }}",
        "{% for a in range(99999) recursive %}{% if loop.depth < 4 %}{{ loop(range(99999)) }}"
        "{% endif %}{% endfor %}",
        "{% set n = namespace(x='xxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}",
        "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% if 'x'.ljust(10000000000) %}{% endif %}",
        "{% if messages | tojson(indent=10000000000) %}{% endif %}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ undefined_function() }}",
        "{% broken",
    ],
)
def test_a_hostile_template_is_a_named_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = tokenizer_with(tmp_path / "model", template)
    with pytest.raises(MilpyError, match="chat template"):
        tokenizer.apply_chat_template(USER)
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ ''['__class__'] }}",
        "{{ messages|map(attribute='__class__')|join }}",
        "{{ namespace().__init__ }}",
        "{{ ('{0.__class__}'.format(messages)) }}",
        "{% set f = ''.format_map %}{{ f({'a': 1}).__class__ }}",
    ],
)
def test_what_is_hidden_reads_as_nothing(tmp_path: Path, template: str) -> None:
    assert tokenizer_with(tmp_path, template).apply_chat_template(USER) == ""


def test_a_template_that_loops_on_one_conversation_leaves_the_next_alone(tmp_path: Path) -> None:
    """Two nested loops that print nothing once ran for ever: time was looked at between prints."""
    template = (
        "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) "
        "%}{% endfor %}{% endfor %}{% endif %}{{ messages[0].content }}"
    )
    tokenizer = tokenizer_with(tmp_path, template)
    assert tokenizer.apply_chat_template(USER) == "hello"
    with pytest.raises(RequestError, match="took too long, expected at most 1 s"):
        tokenizer.apply_chat_template([{"role": "user", "content": "loop"}])
    assert tokenizer.apply_chat_template(USER) == "hello"


def test_threads_get_their_own_answers(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, "{{ messages[0].content }}")
    texts = [str(i) * 50 for i in range(64)]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(
            lambda text: tokenizer.apply_chat_template([{"role": "user", "content": text}]), texts
        )
        assert list(found) == texts


def test_ctrl_c_leaves_no_answer_for_the_next_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_with(tmp_path, "{{ messages[0].content }}")
    child = tokenizer.check_chat_template()._process._child  # type: ignore[union-attr]
    with monkeypatch.context() as patch:
        patch.setattr(child, "stdout", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            tokenizer.apply_chat_template([{"role": "user", "content": "first"}])
    assert child.poll() is not None
    assert tokenizer.apply_chat_template(USER) == "hello"


class Interrupted:
    """A pipe at which Ctrl-C is pressed while its line is awaited."""

    closed = True

    def readline(self) -> bytes:
        raise KeyboardInterrupt

    def close(self) -> None:
        pass


def test_the_process_ends_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, "{{ messages[0].content }}")
    child = tokenizer.check_chat_template()._process._child  # type: ignore[union-attr]
    assert child.poll() is None
    del tokenizer
    gc.collect()
    assert child.poll() is not None


def test_no_template_is_a_named_error(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, None)
    with pytest.raises(TokenizerError, match="has no chat template"):
        tokenizer.apply_chat_template(USER)


def test_a_template_over_the_cap_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="expected at most 262144"):
        tokenizer_with(tmp_path / "a", "x" * ((256 << 10) + 1)).apply_chat_template(USER)
    write_tokenizer(tmp_path / "b", template_file="x" * ((256 << 10) + 1))
    with pytest.raises(TokenizerError, match="expected at most 262144"):
        Tokenizer(tmp_path / "b").apply_chat_template(USER)


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ("hello", "messages is a string"),
        ([], "messages is empty"),
        (["hello"], r"messages\[0\] is a string"),
        ([{"content": "x"}], r"messages\[0\]: role is None"),
        ([{"role": 1, "content": "x"}], r"messages\[0\]: role is 1"),
        ([*USER, {"role": "user"}], r"messages\[1\]: content is absent"),
        ([{"role": "user", "content": object()}], r"messages\[0\]: has a object"),
        ([{"role": "user", "content": "\ud800"}], "lone surrogate"),
    ],
)
def test_messages_of_another_form_are_named(tmp_path: Path, messages: object, found: str) -> None:
    tokenizer = tokenizer_with(tmp_path, CHAT_TEMPLATE)
    with pytest.raises(RequestError, match=found):
        tokenizer.apply_chat_template(messages)  # type: ignore[arg-type]

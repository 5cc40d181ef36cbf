"""Tasks as YAML files: read, refused, prompted, judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semalign.config.read import resolve
from semalign.config.sections import Sandbox
from semalign.errors import UserError
from semalign.models.loading import load_tokenizer
from semalign.plugins import load_plugins
from semalign.stages.scoring import Generation, judge, requests
from semalign.tasks import TASKS, load_split
from semalign.tasks.file import read_task_file
from semalign.tasks.protocols import PROTOCOLS, find_protocol
from tests.tasks.test_tasks import ROUND, UNCLEAR

EXAMPLES = Path("examples/tasks").resolve()
ROOT = Path("unused")


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(TASKS, "_things", dict(TASKS))
    monkeypatch.setenv("SEMALIGN_PLUGINS", "")


def task(folder: Path, text: str, rows: list[dict[str, Any]], name: str = "mine") -> str:
    """A task file with one split `test`, registered; returns its name."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    file = folder / f"{name}.yaml"
    file.write_text(f"splits: {{test: rows.jsonl}}\n{text}", encoding="utf-8")
    load_plugins([str(file)])
    return name


def judged(name: str, generations: list[Generation], protocol: str = "paper") -> list[Any]:
    examples, how = load_split(ROOT, name, "test"), find_protocol(protocol)
    made = requests(examples, load_tokenizer("zoo/student"), how, max_model_len=256)
    return judge(examples, made, generations, split="test", protocol=how, sandbox=Sandbox())


def texts(*answers: str) -> list[Generation]:
    return [
        Generation(texts=(answer,), token_ids=((0,),), unfinished=(False,)) for answer in answers
    ]


def test_a_file_names_a_task_in_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    config = resolve([], ["data.task=kinds.yaml", "evaluation.tasks=[mmlu,kinds.yaml]"])
    assert config.data.task == "kinds"
    assert config.evaluation.tasks == ("mmlu", "kinds")
    assert config.plugins == (str(EXAMPLES / "kinds.yaml"),)
    load_plugins(config.plugins)
    [first, *_] = load_split(ROOT, "kinds", "test")
    assert first.id == "kinds/0"
    assert first.prompt.endswith("have?\nAnswer:") and first.answer in (
        " animal",
        " fruit",
        " tool",
        " metal",
    )


def test_the_examples_are_short_and_complete() -> None:
    for name in ("kinds", "german", "stories"):
        file = EXAMPLES / f"{name}.yaml"
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 20
        load_plugins([str(file)])
        sizes = {split: len(load_split(ROOT, name, split)) for split in TASKS[name].files}
        assert sizes == {"train": 96, "extract": 8, "dev": 24, "test": 24}


def test_choices_of_one_token_are_one_request_and_longer_ones_are_spans(tmp_path: Path) -> None:
    tokenizer, protocol = load_tokenizer("zoo/student"), find_protocol("paper")
    text = 'prompt: "Is it {{ a }}?\\nAnswer:"\nanswer: "{{ label }}"\nmetric: choices\n'
    rows = [{"a": "red", "label": "A"}, {"a": "big", "label": " B"}]
    name = task(tmp_path, text + 'choices: [" A", " B"]\n', rows)
    made = requests(load_split(ROOT, name, "test"), tokenizer, protocol, max_model_len=256)
    assert [[tokenizer.decode(i) for i in request.choice_ids or ()] for request in made] == [
        [" A", " B"]
    ] * 2
    name = task(tmp_path, text + "choices: ['{{ a }} A', ' B']\n", [{"a": "red", "label": "B"}])
    [request] = requests(load_split(ROOT, name, "test"), tokenizer, protocol, max_model_len=256)
    assert request.choice_ids is None
    scored = [tokenizer.decode(ids[start:]) for ids, start in request.spans]
    assert scored == ["red A", " B"]
    whole = [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in request.spans]
    assert whole == ["Is it red?\nAnswer:red A", "Is it red?\nAnswer: B"]
    [record] = judged(name, [Generation(choice_scores=(-3.0, -2.0), greedy=(False, False))])
    assert (record.extracted, record.correct) == ("B", True)


def test_choices_can_be_a_column_and_be_compared_by_length(tmp_path: Path) -> None:
    text = 'prompt: "{{ q }}"\nanswer: "{{ options[label] }}"\nchoices: options\nmetric: choices\n'
    rows = [{"q": "Which?", "options": ["a", "a much longer one"], "label": 1}]
    name = task(tmp_path, text, rows)
    scores = [Generation(choice_scores=(-2.0, -4.0), greedy=(False, False))]
    assert not judged(name, scores)[0].correct
    name = task(tmp_path, f"{text}per_byte: true\n", rows)
    assert judged(name, scores)[0].extracted == "a much longer one"


@pytest.mark.parametrize(
    ("metric", "output", "right"),
    [
        ("exact_match", " Paris\n", True),
        ("exact_match", " paris", False),
        ("exact_match\nignore_case: true", " paris", True),
        ("exact_match\npattern: 'is (\\w+)'", "It is big. It is Paris.", True),
        ("exact_match\npattern: 'is (\\w+)'", "Paris", False),
        ("contained", " It is Paris, surely", True),
        ("contained", " London", False),
    ],
)
def test_text_is_matched(tmp_path: Path, metric: str, output: str, right: bool) -> None:
    text = f'prompt: "{{{{ q }}}}"\nanswer: " {{{{ a }}}}"\nmetric: {metric}\n'
    name = task(tmp_path, text, [{"q": "Where?", "a": "Paris"}])
    [record] = judged(name, texts(output))
    assert record.correct is right


def test_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    name = task(tmp_path, "prompt: '{{ q }}'\nanswer: ' {{ a }}'\nmetric: numeric\n",
                [{"q": "?", "a": 1200}, {"q": "??", "a": "5"}])  # fmt: skip
    assert [record.correct for record in judged(name, texts(" 3 + 1,200.0", " none"))] == [1, 0]


NUMERIC = "prompt: '{{ q }}'\nanswer: ' {{ a }}'\nmetric: numeric\n"


@pytest.mark.parametrize("number", [*UNCLEAR[:-1], "16-3"])
@pytest.mark.parametrize("text", ["{}", "So it is {}", "2 + 2 = {}", "So.\n#### {}"])
def test_references_that_are_not_one_number_are_refused(
    tmp_path: Path, text: str, number: str
) -> None:
    task(tmp_path, NUMERIC, [{"q": 1, "a": text.format(number) or "x"}])
    expected = r"rows\.jsonl:1: answer: metric=numeric compares one number at its end, such as"
    with pytest.raises(UserError, match=expected):
        load_split(ROOT, "mine", "test")


@pytest.mark.parametrize(
    "text",
    [
        *ROUND,
        *(
            "3 + 4 = 7",
            "It takes 3 steps and costs 42 dollars.",
            "x=5",
            "Answer: 5",
            "5 eggs, 6 hens",
        ),
        *("It is 20. Surely.", "In 1990, 7", "16 - 3 = 13", "1 2/3\n#### 5"),
    ],
)
def test_references_that_end_in_one_number_are_accepted(tmp_path: Path, text: str) -> None:
    task(tmp_path, NUMERIC, [{"q": 1, "a": text}])
    load_split(ROOT, "mine", "test")


def test_chrf_is_sacrebleus_and_is_a_score(tmp_path: Path) -> None:
    from sacrebleu.metrics import CHRF

    name = task(tmp_path, "prompt: '{{ q }}'\nanswer: ' {{ a }}'\nmetric: chrf\n",
                [{"q": "?", "a": "Ann hat 3 Eier."}])  # fmt: skip
    [record] = judged(name, texts(" Ann hat 4 Eier.\n"))
    expected = CHRF().sentence_score("Ann hat 4 Eier.", ["Ann hat 3 Eier."]).score / 100
    assert record.score == pytest.approx(expected) and 0.5 < record.score < 1
    assert not record.correct


def test_code_runs_in_the_sandbox(tmp_path: Path) -> None:
    text = """
prompt: "{{ q }}"
answer: "{{ code }}"
metric: code
stop: ["\\n\\n"]
program: {tests: "assert {{ name }}(2) == {{ want }}", entry: ["{{ name }}"]}
"""
    code = "def twice(x):\n    return 2 * x"
    name = task(tmp_path, text, [{"q": "twice", "code": code, "name": "twice", "want": 4}])
    how = find_protocol("paper")
    examples = load_split(ROOT, name, "test")
    made = requests(examples, load_tokenizer("zoo/student"), how, max_model_len=256)
    for output, right in ((code + "\n\nmore", True), (code.replace("2", "3"), False)):
        [record] = judge(examples, made, texts(output), split="test", protocol=how,
                         sandbox=Sandbox(min_tier=3))  # fmt: skip
        assert record.correct is right


def test_a_corpus_is_scored_by_the_log_probability_of_a_byte(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("zoo/student")
    name = task(tmp_path, "format: text\n", [{"text": "Ann has 3 eggs."}])
    [example] = load_split(ROOT, name, "test")
    assert (example.prompt, example.answer) == ("", "Ann has 3 eggs.")
    [request] = requests([example], tokenizer, find_protocol("paper"), max_model_len=256)
    ids = tuple(tokenizer("Ann has 3 eggs.", add_special_tokens=False)["input_ids"])
    assert request.spans == (((tokenizer.bos_token_id, *ids), 1),)
    # a context of 8 tokens leaves 7 of prompt: windows that overlap in one id
    [request] = requests([example], tokenizer, find_protocol("paper"), max_model_len=6)
    scored = [i for piece, start in request.spans for i in piece[start:]]
    assert tuple(scored) == ids and max(len(piece) for piece, _ in request.spans) == 5
    generation = Generation(choice_scores=(-20.0, -10.0), greedy=(False, False))
    [record] = judged(name, [generation])
    assert record.score == pytest.approx(-30.0 / len("Ann has 3 eggs."))


def test_parquet_rows_and_renamed_columns(tmp_path: Path) -> None:
    rows = [{"frage": "Wo?", "antworten": {"text": ["hier"]}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    file = tmp_path / "squad.yaml"
    file.write_text(
        "splits: {test: rows.parquet}\ncolumns: {q: frage}\n"
        'prompt: "{{ q }}"\nanswer: " {{ antworten.text[0] }}"\n'
    )
    load_plugins([str(file)])
    [example] = load_split(ROOT, "squad", "test")
    assert (example.prompt, example.answer) == ("Wo?", " hier")


def test_a_file_may_differ_by_protocol_and_changes_no_other_hash(tmp_path: Path) -> None:
    before = {name: protocol.hash for name, protocol in PROTOCOLS.items()}
    text = "prompt: '{{ q }}'\nanswer: ' {{ a }}'\n"
    name = task(tmp_path, text, [{"q": "Where?", "a": "here"}])
    plain = find_protocol("paper").label(name)
    task(tmp_path, text + "protocols: {paper: {prompt: 'Q: {{ q }}'}}\n", [{"q": "?", "a": "b"}])
    assert find_protocol("paper").profile(name).prompt == "Q: {{ q }}"
    assert find_protocol("open-instruct").profile(name).prompt == "{{ q }}"
    assert find_protocol("paper").label(name) != plain
    task(tmp_path, f"{text}ignore_case: true\n", [{"q": "?", "a": "b"}])
    assert find_protocol("paper").label(name) != plain  # what judges answers is part of it
    assert {name: protocol.hash for name, protocol in PROTOCOLS.items()} == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("promt: x\nanswer: y", r"mine\.yaml: promt: unknown key; did you mean 'prompt'\?"),
        ("prompt: x", r"answer: missing; expected a template"),
        ("prompt: x\nanswer: y\nmetric: exact", r"metric='exact': did you mean 'exact_match'\?"),
        ("prompt: '{{ q'\nanswer: y", r"prompt: not a Jinja template"),
        ("prompt: x\nanswer: y\nmetric: choices", r"choices: expected with metric=choices"),
        ("prompt: x\nanswer: y\nchoices: [a]", r"choices: leave it out with metric=exact_match"),
        ("prompt: x\nanswer: y\nmetric: code", r"program: expected with metric=code"),
        ("prompt: x\nanswer: y\nmetric: chrf\nignore_case: true", r"ignore_case: has no effect"),
        ("prompt: x\nanswer: y\npattern: '('", r"pattern: not a regular expression"),
        ("format: text\nprompt: x", r"prompt: a row of format=text has none"),
        ("format: text\nmetric: numeric", r"metric=numeric: a corpus has no answers"),
        ("prompt: x\nanswer: y\nprotocols: {paper: {metric: x}}", r"protocols\.paper\.metric: "),
    ],
)
def test_what_a_file_gets_wrong_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_plugins([str(tmp_path / "mine.yaml")])
    assert "\n" not in str(caught.value) and "mine.yaml" in str(caught.value)


def test_a_name_is_no_built_in_one_and_fits_everywhere(tmp_path: Path) -> None:
    for name in ("mmlu.yaml", "my task.yaml"):
        (tmp_path / name).write_text("format: text")
        with pytest.raises(UserError, match=r"built-in task; give|expected a name of letters"):
            read_task_file(tmp_path / name)
    with pytest.raises(UserError, match=r"gone\.yaml: does not exist"):
        load_plugins([str(tmp_path / "gone.yaml")])


@pytest.mark.parametrize(
    ("text", "row", "message"),
    [
        ("prompt: '{{ q }}'\nanswer: x", {"w": 1}, r"jsonl:1: 'q' is undefined; the row has: w"),
        ("columns: {q: quest}\nprompt: '{{ q }}'\nanswer: x", {"question": 1},
         r"columns\.q: no column 'quest'; did you mean 'question'\?"),
        ("prompt: x\nanswer: '{{ a }}'", {"a": ""}, r"answer: empty; expected some text"),
        ("prompt: '{{ a.b.c }}'\nanswer: x", {"a": {}}, r"has no attribute 'b'"),
        ("prompt: '{{ a + 1 }}'\nanswer: x", {"a": "s"}, r"a template fails"),
        ("prompt: x\nanswer: '{{ a }}'\nmetric: choices\nchoices: [' yes', ' no']", {"a": "yess"},
         r"'yess' is none of the choices; did you mean 'yes'\?"),
        ("prompt: x\nanswer: a\nmetric: choices\nchoices: a", {"a": "one"},
         r"choices: 'a' must be a list of texts"),
    ],
)  # fmt: skip
def test_what_a_row_lacks_is_one_line(
    tmp_path: Path, text: str, row: dict[str, Any], message: str
) -> None:
    name = task(tmp_path, text, [row])
    with pytest.raises(UserError, match=message):
        load_split(ROOT, name, "test")


def test_a_template_cannot_reach_out(tmp_path: Path) -> None:
    name = task(tmp_path, "prompt: \"{{ ''.__class__.__mro__ }}\"\nanswer: x", [{"a": 1}])
    with pytest.raises(UserError, match="unsafe"):
        load_split(ROOT, name, "test")

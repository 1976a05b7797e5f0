"""Conversations -> token ids with a loss weight per token, from the model's own chat template.

The text is tokenised once, so the ids are those of apply_chat_template(tokenize=True). A token is trained if it begins
inside a trained turn: after the generation prompt, up to and including the end-of-turn token.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from tunewright.core.conversation import Conversation, Message
from tunewright.core.errors import DataError, Problem, UserError
from tunewright.core.example import Example, Group
from tunewright.data.blocks import Documents, in_blocks
from tunewright.data.sides import answers, framed_pair, labelled, length, reads_frames, shortened
from tunewright.data.spans import Span, Turns, Written, plain, write
from tunewright.data.tokenizer import Tokenizer

TrainOn = Literal["assistant", "last"]
Overlong = Literal["error", "truncate", "drop"]
LIMIT = 100
SHOWN = 5


@dataclass
class RenderReport:
    """What rendering did, filled while it runs; `notes` is complete at the end.

    rows, examples: rows read, examples made (a rewriting template makes several of one row).
    overlong: examples longer than max_length; truncated and dropped say what became of them. longest: tokens.
    empty: examples dropped because cutting them left nothing to learn from. equal: pairs whose answers became the same.
    cut: texts longer than a block.
    tokens, supervised_tokens: of the examples that were kept.
    split_rows: rows that became one example per trained turn. straddling: spans that begin inside a token.
    end_of_turn: the token with which trained turns end, '' if the template has none. unended: spans without one.
    problems: rows that were refused, at most 100; n_problems counts all.
    """

    rows: int = 0
    examples: int = 0
    overlong: int = 0
    truncated: int = 0
    dropped: int = 0
    empty: int = 0
    equal: int = 0
    cut: int = 0
    longest: int = 0
    longest_line: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    split_rows: int = 0
    straddling: int = 0
    end_of_turn: str = ""
    unended: int = 0
    spans: int = 0
    control_in_text: int = 0
    n_problems: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    end_ids: set[int] = field(default_factory=set)

    def refuse(self, problems: Iterable[Problem]) -> None:
        for p in problems:
            self.n_problems += 1
            if len(self.problems) < LIMIT:
                self.problems.append(p)


def render_rows(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    *,
    shape: str = "chat",
    train_on: TrainOn = "assistant",
    max_length: int,
    overlong: Overlong = "error",
    report: RenderReport | None = None,
    labels: Sequence[str] | None = None,
    head: str = "lm",
    documents: Documents | None = None,
) -> Iterator[Group]:
    """Groups of examples, in the order of the rows: one example each, or two (preferred, rejected) for `preference`.

    shape: `chat`, `preference`, `unpaired`, `prompt`, `text` or `labelled`; every row must have it. A prompt is
        rendered up to where the answer begins, and nothing of it is trained.
    train_on: `assistant` trains every assistant turn whose weight is not 0, `last` only the last of them.
    max_length: tokens that an example may have. overlong: `error` refuses the file, `truncate` cuts the end off,
    `drop` leaves the example (or pair) out.
    labels: the names of the classes of `labelled` rows, in order; None: labels are values.
    head: what reads the rows: with `multilabel` a row may have several classes; any head but `lm` reads pairs of a
    model without chat template, too, and those of an encoder as two texts.
    documents: how plain texts are laid into blocks of max_length tokens (data/blocks.py); None: a text is a group.
    Raises one DataError at the end, after every row was seen, that names the rows that could not be used.
    """
    report = RenderReport() if report is None else report
    groups = _rendered(conversations, tokenizer, shape, train_on, report, labels, head)
    if documents is not None:
        fitted = in_blocks(_texts(groups, max_length, report), max_length, documents)
    else:
        fitted = (f for g in groups if (f := _fit(g, max_length, overlong, report, tokenizer)) is not None)
    for group in fitted:
        report.examples += len(group.examples)
        report.tokens += group.n_tokens
        report.supervised_tokens += sum(w > 0 for e in group.examples for w in e.weights)
        yield group
    _finish(report, tokenizer, max_length, overlong)


def _rendered(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    shape: str,
    train_on: TrainOn,
    report: RenderReport,
    labels: Sequence[str] | None,
    head: str,
) -> Iterator[Group]:
    """The groups of every row, of whatever length; what is wrong with a row goes into the report."""
    for conversation in conversations:
        report.rows += 1
        try:
            yield from _render(conversation, tokenizer, shape, train_on, report, labels, head)
        except UserError as e:
            report.refuse(e.problems if isinstance(e, DataError) else [Problem(conversation.source, e.message)])


def _texts(groups: Iterable[Group], max_length: int, report: RenderReport) -> Iterator[Example]:
    """The texts themselves, counted."""
    for group in groups:
        (text,) = group.examples
        report.cut += len(text.ids) > max_length
        report.empty += len(text.ids) < 2
        yield text


def _render(
    row: Conversation,
    tokenizer: Tokenizer,
    shape: str,
    train_on: TrainOn,
    report: RenderReport,
    labels: Sequence[str] | None,
    head: str,
) -> list[Group]:
    if row.shape != shape:
        problem = Problem(row.source, f"is a {row.shape} row, but the job needs {shape} rows.")
        raise DataError(str(problem), problems=[problem])
    if shape == "labelled":
        return [labelled(row, tokenizer, labels, several=head == "multilabel")]
    if shape == "prompt":
        return [_prompt(row, tokenizer)]
    if shape == "preference" and head != "lm" and reads_frames(tokenizer):
        return [_with_margin(framed_pair(row, tokenizer), row)]
    if tokenizer.decoder_start_id is not None:
        return answers(row, tokenizer, _trained(row.messages, train_on), tokenizer.decoder_start_id)
    if row.text is not None:
        return [_text(row.text, row.source, tokenizer, report)]
    if shape == "preference":
        return [_with_margin(_pair(row, tokenizer, report), row)]
    if shape == "unpaired":
        return [_marked(row, tokenizer, report)]
    turns = _turns(
        row, row.messages, _trained(row.messages, train_on), [f"messages[{i}]" for i in range(len(row.messages))]
    )
    _refuse_control_tokens(turns, tokenizer)
    written = write(turns, tokenizer)
    report.split_rows += len(written) > 1
    return [Group((_example(w, row.source, tokenizer, report),)) for w in written]


def _trained(messages: list[Message], train_on: TrainOn) -> dict[int, float]:
    """Index of each trained turn and its loss weight."""
    weights = {
        i: 1.0 if m.weight is None else m.weight
        for i, m in enumerate(messages)
        if m.role == "assistant" and m.weight != 0
    }
    return weights if train_on == "assistant" else dict(list(weights.items())[-1:])


def _turns(row: Conversation, messages: list[Message], trained: dict[int, float], names: list[str]) -> Turns:
    if not trained:
        problem = Problem(row.source, "has no assistant message to train.", "messages")
        raise DataError(str(problem), problems=[problem])
    return Turns([plain(m) for m in messages], row.tools, trained, names, row.source)


def _refuse_control_tokens(turns: Turns, tokenizer: Tokenizer) -> None:
    """A control token in a message would end or begin a turn in the middle of its text."""
    for i, message in enumerate(turns.messages):
        calls = [c["function"]["arguments"] for c in message.get("tool_calls") or ()]
        for key, text in [("content", message.get("content") or ""), *(("tool_calls", a) for a in calls)]:
            found = tokenizer.control_pattern.search(text)
            if found:
                problem = Problem(
                    turns.line,
                    f"message {i + 1} ({message['role']}) contains an invalid token: {found.group()}. The model reads "
                    "it as a control token, not as text; remove or rewrite it.",
                    f"{turns.names[i]}.{key}",
                    found.group(),
                    code="invalid_file_format",
                )
                raise DataError(str(problem), problems=[problem], code=problem.code)


def _example(written: Written, source: int, tokenizer: Tokenizer, report: RenderReport) -> Example:
    """Tokenise the text once and give each token the weight of the span that it begins in."""
    ids, offsets = tokenizer.encode(written.text)
    starts = [start for start, _ in offsets]
    weights = [0.0] * len(ids)
    for span, weight in written.spans:
        first = bisect_left(starts, span.start)
        # a token that begins before the span belongs to the prompt, even if it reaches into the span
        report.straddling += first > 0 and offsets[first - 1][1] > span.start and starts[first - 1] < span.start
        stop = _end_of_turn(ids, starts, first, span, tokenizer, report)
        weights[first:stop] = [weight] * (stop - first)
    if weights:
        weights[0] = 0.0
    return Example(tuple(ids), tuple(weights), source)


def _end_of_turn(
    ids: list[int], starts: list[int], first: int, span: Span, tokenizer: Tokenizer, report: RenderReport
) -> int:
    """One past the last token of the span to train: its end-of-turn token, or all of it if the template has none."""
    stop = bisect_left(starts, span.end, lo=first)
    report.spans += 1
    ends = tokenizer.special_ids | tokenizer.eos_ids
    for j in range(stop - 1, first - 1, -1):
        if starts[j] < span.told:
            break
        if ids[j] in ends:
            report.end_ids.add(ids[j])
            return j + 1
    report.unended += 1
    return stop


def _text(text: str, source: int, tokenizer: Tokenizer, report: RenderReport) -> Group:
    """A plain text: every token is trained, and the end token after it."""
    report.control_in_text += tokenizer.control_pattern.search(text) is not None
    ids, _ = tokenizer.encode(text, add_special=True)
    if tokenizer.eos_id is not None and (not ids or ids[-1] != tokenizer.eos_id):
        ids = [*ids, tokenizer.eos_id]
    report.spans += 1
    report.unended += tokenizer.eos_id is None
    report.end_ids |= set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    return Group((Example(tuple(ids), (0.0, *[1.0] * (len(ids) - 1)), source),))


def _pair(row: Conversation, tokenizer: Tokenizer, report: RenderReport) -> Group:
    """The preferred and the rejected answer after the same input, with the length of what they share."""
    examples = []
    for name, answer in (("preferred_output", row.preferred), ("non_preferred_output", row.rejected)):
        messages = row.messages + (answer or [])
        names = [f"input.messages[{i}]" for i in range(len(row.messages))]
        names += [f"{name}[{i}]" for i in range(len(answer or []))]
        trained = {i: 1.0 for i in range(len(row.messages), len(messages)) if messages[i].role == "assistant"}
        turns = _turns(row, messages, trained, names)
        _refuse_control_tokens(turns, tokenizer)
        written = write(turns, tokenizer)
        examples.append(_example(written[-1], row.source, tokenizer, report))
    return Group(tuple(examples), _shared(examples))


def _marked(row: Conversation, tokenizer: Tokenizer, report: RenderReport) -> Group:
    """One answer that somebody marked as good or bad."""
    names = [f"messages[{i}]" for i in range(len(row.messages))]
    turns = _turns(row, row.messages, {len(row.messages) - 1: 1.0}, names)
    _refuse_control_tokens(turns, tokenizer)
    example = _example(write(turns, tokenizer)[-1], row.source, tokenizer, report)
    return Group((replace(example, wanted=bool(row.label)),))


def _prompt(row: Conversation, tokenizer: Tokenizer) -> Group:
    """What is to be answered, with what graders know of the row."""
    names = [f"messages[{i}]" for i in range(len(row.messages))]
    turns = Turns([plain(m) for m in row.messages], row.tools, {}, names, row.source)
    _refuse_control_tokens(turns, tokenizer)
    ids = tokenizer.encode_chat(turns.messages, turns.tools)
    item = json.dumps(row.item or {}, ensure_ascii=False)
    return Group((Example(tuple(ids), (0.0,) * len(ids), row.source, item=item),))


def _with_margin(pair: Group, row: Conversation) -> Group:
    if row.margin is None:
        return pair
    preferred, *others = pair.examples
    return replace(pair, examples=(replace(preferred, margin=row.margin), *others))


def _shared(examples: list[Example]) -> int:
    """How many leading tokens all examples share, at most up to the first trained one."""
    n = min(len(e.ids) for e in examples)
    for e in examples:
        n = min(n, next((t for t, w in enumerate(e.weights) if w > 0), n))
    first = examples[0].ids
    return next((t for t in range(n) if any(e.ids[t] != first[t] for e in examples)), n)


def _fit(group: Group, max_length: int, overlong: Overlong, report: RenderReport, tokenizer: Tokenizer) -> Group | None:
    """The group if it is short enough; else what the policy makes of it."""
    longest = max(group.examples, key=length)
    if length(longest) > report.longest:
        report.longest, report.longest_line = length(longest), longest.source
    if length(longest) > max_length:
        report.overlong += 1
        if overlong != "truncate" or longest.item is not None:
            report.dropped += overlong != "error"
            return None
        cut = tuple(shortened(e, max_length, tokenizer) for e in group.examples)
        group = Group(cut, min(group.prefix, max_length))
    if not all(e.is_labelled or e.item is not None or any(w > 0 for w in e.weights[1:]) for e in group.examples):
        report.empty += 1
        return None
    if len(group.examples) > 1 and all(e.ids == group.examples[0].ids for e in group.examples):
        report.equal += 1
        return None
    report.truncated += length(longest) > max_length
    return group


def _finish(report: RenderReport, tokenizer: Tokenizer, max_length: int, overlong: Overlong) -> None:
    """Complete the notes; raise the one error, if rows were refused."""
    report.end_of_turn = " ".join(sorted(tokenizer.token(i) or "" for i in report.end_ids))
    longest = f"the longest has {report.longest} tokens (line {report.longest_line})"
    said = []
    if report.n_problems:
        shown = "; ".join(str(p) for p in report.problems[:SHOWN])
        more = f"; and {report.n_problems - SHOWN} more" if report.n_problems > SHOWN else ""
        said.append(f"{report.n_problems} of {report.rows} rows cannot be used: {shown}{more}")
    if overlong == "error" and report.overlong:
        text = (
            f"{report.overlong} of {report.rows} rows are longer than the limit of {max_length} tokens; {longest}. "
            "Shorten them, raise max_length if the model allows it, or set overlong to 'truncate' or 'drop'."
        )
        said.append(text)
        report.refuse([Problem(report.longest_line, text, "max_length", str(report.longest), f"up to {max_length}")])
    if said:
        raise DataError(" ".join(said), problems=report.problems, code=report.problems[0].code)
    report.notes += [text for true, text in _notes(report, tokenizer, max_length, longest) if true]


def _notes(report: RenderReport, tokenizer: Tokenizer, max_length: int, longest: str) -> list[tuple[object, str]]:
    over = f"are longer than {max_length} tokens; {longest}"
    unheard = sorted(tokenizer.token(i) or "" for i in report.end_ids - tokenizer.eos_ids)
    return [
        (report.truncated, f"{report.truncated} rows were cut at the end because they {over}"),
        (report.dropped, f"{report.dropped} rows were left out because they {over}"),
        (
            report.empty,
            f"{report.empty} rows were left out because nothing to learn from is left within {max_length} tokens",
        ),
        (report.cut, f"{report.cut} texts were cut into pieces because they are longer than {max_length} tokens"),
        (
            report.equal,
            f"{report.equal} pairs were left out because the tokens of both answers are the same (within {max_length} "
            "tokens)",
        ),
        (
            report.split_rows,
            f"the chat template rewrites earlier turns when more follow, so {report.split_rows} rows became one "
            "example for each trained turn",
        ),
        (
            report.unended,
            f"{report.unended} of {report.spans} trained texts end without an end-of-turn token, because the model has "
            "none there: it does not learn when to stop",
        ),
        (
            bool(unheard),
            f"trained turns end with {', '.join(unheard)}, but generation does not stop there: add it to eos_token_id "
            "of generation_config.json",
        ),
        (
            report.straddling,
            f"{report.straddling} trained turns begin in the middle of a token; that token counts as the prompt's",
        ),
        (
            report.control_in_text,
            f"{report.control_in_text} texts hold control tokens of the model, which are read as such",
        ),
    ]

"""Requests that a hostile or careless client might send: `steering` right, nearly right, and wild.

A body is a tree of Python values with two more leaves, so that it can be what no JSON library
writes: `Literal`, text put down as it is, and `Pairs`, an object whose keys may repeat.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote, urlencode

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from steering.request.limits import OPS, UNITS

#: Examples that one seed gives: where hypothesis finds no more, the next seed goes on.
EXAMPLES: Final = 250
JSON_HEADERS: Final = {"content-type": "application/json"}


@dataclass(frozen=True)
class Literal:
    """JSON text, or what passes for it."""

    text: str

    def __repr__(self) -> str:
        return f"Literal({self.text[:40]!r}, {len(self.text)} characters)"


@dataclass(frozen=True)
class Pairs:
    """An object by its keys in order; a key may come twice."""

    items: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Shot:
    """One request, and what may be expected of the answer.

    Attributes:
        part: of the grammar.
        judged: whether all but `steering` is valid, so that `steering` alone decides the answer.
        refused_with: the code that the answer must have, whatever `steering` says; None otherwise.
    """

    part: str
    path: str
    content: bytes = b""
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=lambda: JSON_HEADERS)
    judged: bool = False
    refused_with: str | None = None


def dumps(tree: object) -> str:
    """The text of a tree, in ASCII: a lone surrogate is an escape."""
    if isinstance(tree, Literal):
        return tree.text
    if isinstance(tree, Mapping):
        tree = Pairs(tuple(tree.items()))
    if isinstance(tree, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{dumps(item)}" for key, item in tree.items) + "}"
    if isinstance(tree, list | tuple):
        return "[" + ",".join(map(dumps, tree)) + "]"
    return json.dumps(tree)


# Values

#: Numbers at the edges of what the field, Python, IEEE 754 and JSON take.
NUMBERS: Final[tuple[Any, ...]] = (
    *(0, 1, -1, 63, 64, 65, 127, 128, 2**31 - 1, 2**31, -(2**31), 2**53 + 1, 2**63, 2**64, 10**30),
    *(7.0, 1.5, -0.0, 5e-324, 1e6, 1000000.1, -1e6, 1.7976931348623157e308),
    *map(Literal, ["NaN", "-Infinity", "Infinity", "1e999", "-1e999", "1e-999", "-0", "1E+2"]),
    *map(Literal, ["9" * 4000, "9" * 5000, "0." + "3" * 5000, "-" + "1" * 4301]),
)
#: What is no JSON at all.
BROKEN: Final = tuple(
    map(Literal, ["", "00", "0x10", "tru", "'a'", "[1,]", "nan", "\\u0031", "//"])
)
TEXTS: Final = (
    *("", " ", "\0", "\ud800", "\udfff\ud800", "1", "true", "null", "NaN", "clamp ", "CLAMP"),
    *("../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "http://169.254.169.254/"),
    *(
        "hf://a/b",
        "__proto__",
        "%s%n",
        "{{7*7}}",
        "<script>",
        "\x1b[2J",
        "a\r\nb: c",
        "\u202e",
        "é" * 9,
    ),
)
NESTS: Final = (
    *(Literal("[" * n + "]" * n) for n in (3, 100, 990, 3000, 50_000)),
    *(Literal('{"steering":' * n + "1" + "}" * n) for n in (3, 100, 990, 50_000)),
    Literal("[" * 50_000),
)
#: Megabytes each.
HUGE: Final = (
    Literal("[" + "0," * 999_999 + "0]"),
    Literal("[" + '{"feature":1},' * 99_999 + "0]"),
    Literal("{" + ",".join(f'"{i}":0' for i in range(100_000)) + "}"),
    Literal('"' + "x" * 1_000_000 + '"'),
    Literal("1" * 1_000_000),
)

_text = st.sampled_from(TEXTS) | st.text(max_size=8) | st.just("x" * 5000)
_leaf = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.integers() | st.floats() | _text
_tree = st.recursive(
    _leaf,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=8,
)
# Shrinks to 0 and favours both ends, so what is to be rare lies between.
_percent = st.integers(0, 99)


@st.composite
def wild(draw: st.DrawFn) -> Any:
    """Any value: mostly small, now and then broken, deeply nested or huge."""
    chance = draw(_percent)
    if chance == 90:
        return draw(st.sampled_from(HUGE))
    if 80 < chance < 86:
        return draw(st.sampled_from(NESTS))
    if 70 < chance < 74:
        return draw(st.sampled_from(BROKEN))
    return draw(_leaf if chance < 60 else _tree)


# The field

_VALUES: Final[dict[str, Sequence[Any]]] = {
    "clamp": (0, 0.5, 3, -2.0),
    "scale": (0, 0.5, 2, -1, 1e6),
    "add": (1, 0.25, -3.0, -1e6),
    "floor": (0, 1.5),
    "cap": (0, 2),
}
_ENDS: Final = (1, 2, 5, 200, 2**31, 10**12)

_positions = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.sampled_from([True, True, False, None]),
        "generation": st.sampled_from([True, True, False, None]),
        "special_tokens": st.sampled_from([True, False, None]),
        "start": st.sampled_from([0, 1, 4, 200, None]),
        "end": st.sampled_from([*_ENDS, None]),
    },
)


class Grammar:
    """Requests to one server.

    Args:
        model: the served model's name.
        saes: `d_sae` of each SAE by name.
        prompts: what the requests say; short ones are cheap, and equal ones meet in the cache.
    """

    def __init__(self, model: str, saes: Mapping[str, int], prompts: Sequence[str]) -> None:
        self.model = model
        self.saes = dict(saes)
        self.prompts = tuple(prompts)

    def shots(self) -> st.SearchStrategy[Shot]:
        """Every part, those that reach the engine most often."""
        parts: list[Callable[[], st.SearchStrategy[Shot]]] = [
            *[self.valid] * 3,
            *[self.nearly] * 5,
            *[self.wild_field] * 4,
            *[self.smuggled] * 2,
            *[self.elsewhere, self.damaged, self.sae_route, self.inspect],
        ]
        return st.sampled_from(parts).flatmap(lambda part: part())

    @st.composite
    @staticmethod
    def _edit(draw: st.DrawFn, grammar: Grammar) -> dict[str, Any]:
        sae = draw(st.sampled_from(sorted(grammar.saes)))
        op = draw(st.sampled_from(OPS))
        edit: dict[str, Any] = {
            "sae": sae,
            "feature": draw(st.integers(0, grammar.saes[sae] - 1)),
            "op": op,
        }
        if op != "ablate":
            edit["value"] = draw(st.sampled_from(_VALUES[op]))
        if draw(st.booleans()):
            edit["unit"] = draw(st.sampled_from([*UNITS, None]))
        if draw(st.booleans()):
            edit["positions"] = draw(_positions | st.none())
        return edit

    @st.composite
    @staticmethod
    def _field(draw: st.DrawFn, grammar: Grammar) -> dict[str, Any]:
        """A `steering` field whose types are right; it may still contradict itself."""
        count = draw(st.sampled_from([0, 1, 1, 1, 2, 3, 8, 64]))
        edit = Grammar._edit(grammar)
        if count > 3:
            one = draw(edit)
            limit = grammar.saes[one["sae"]]
            edits = [{**one, "feature": i % limit} for i in range(count)]
        else:
            edits = [draw(edit) for _ in range(count)]
        steering: dict[str, Any] = {"interventions": edits} if edits else {}
        if draw(st.integers(0, 2)) == 0:
            steering["positions"] = draw(_positions)
        if draw(st.integers(0, 3)) == 0:
            steering["error_term"] = draw(st.sampled_from([True, False, None]))
        if draw(st.booleans()):
            steering["report"] = draw(st.sampled_from([True, True, False, None]))
        if not edits or draw(st.integers(0, 2)) == 0:
            sae = draw(st.sampled_from(sorted(grammar.saes)))
            steering["read"] = {"sae": sae, "top_k": draw(st.sampled_from([1, 5, 64, None]))}
        return steering

    @st.composite
    @staticmethod
    def _body(draw: st.DrawFn, grammar: Grammar) -> tuple[str, dict[str, Any]]:
        """A route and a valid body for it, without steering."""
        text = draw(st.sampled_from(grammar.prompts))
        tokens = draw(st.integers(1, 3))
        path = draw(st.sampled_from(["/v1/completions", "/v1/chat/completions", *_OTHERS]))
        said = [{"role": "user", "content": text}]
        body: dict[str, Any] = {"model": grammar.model, "stream": draw(st.booleans())}
        if path == "/v1/responses":
            return path, {**body, "input": text, "max_output_tokens": tokens}
        if path == "/v1/messages":
            return path, {**body, "messages": said, "max_tokens": tokens}
        several = {"n": 2, "seed": 1, "temperature": 0.9}
        options = [{}, {}, several, {"cache_salt": "a"}, {"ignore_eos": True}]
        if path == "/v1/completions":
            options += [{"logprobs": 1}, {"echo": True}, {"return_token_ids": True}]
            options += [{"prompt_logprobs": 1}] if not body["stream"] else []
            prompt = draw(st.sampled_from([text, [text, text], [1, 5, 9, 7], [[1, 5], [1, 6, 8]]]))
            body["prompt"] = prompt
        else:
            options += [{"logprobs": True, "top_logprobs": 2}]
            body["messages"] = said
        if body["stream"]:
            options += [{"stream_options": {"include_usage": True}}]
        return path, {**body, "max_tokens": tokens, **draw(st.sampled_from(options))}

    @st.composite
    @staticmethod
    def _request(
        draw: st.DrawFn, grammar: Grammar, part: str, steering: st.SearchStrategy[Any]
    ) -> Shot:
        path, body = draw(Grammar._body(grammar))
        items = [*body.items()]
        items.insert(draw(st.integers(0, len(items))), ("steering", draw(steering)))
        if 50 < draw(_percent) < 56:
            items.append(("steering", draw(steering)))
        return Shot(part, path, dumps(Pairs(tuple(items))).encode(), judged=True)

    def valid(self) -> st.SearchStrategy[Shot]:
        """Types are right; most of these are answered."""
        return Grammar._request(self, "valid", Grammar._field(self))

    def nearly(self) -> st.SearchStrategy[Shot]:
        """A valid field with one to three things wrong."""
        return Grammar._request(self, "nearly", _mutated(Grammar._field(self)))

    def wild_field(self) -> st.SearchStrategy[Shot]:
        """Anything as the field, or as a part of it."""
        keys = st.sampled_from(["interventions", "positions", "error_term", "report", "read", "x"])
        field_of_wild = st.dictionaries(keys, wild(), max_size=4)
        edit_of_wild = st.dictionaries(
            st.sampled_from(["sae", "feature", "op", "value", "unit", "positions", ""]),
            wild(),
            max_size=6,
        ).map(lambda edit: {"interventions": [edit]})
        return Grammar._request(self, "wild", wild() | field_of_wild | edit_of_wild)

    @st.composite
    @staticmethod
    def _smuggled(draw: st.DrawFn, grammar: Grammar) -> Shot:
        path, body = draw(Grammar._body(grammar))
        key = draw(st.sampled_from(_ENGINE_KEYS))
        smuggled = {key: draw(st.just("x") | st.just([1.0]) | st.just(1))}
        if draw(st.booleans()):
            smuggled["mine"] = "y"
        if draw(st.booleans()):
            body["steering"] = draw(Grammar._field(grammar))
        content = dumps({**body, "vllm_xargs": smuggled}).encode()
        code = "misplaced_steering" if key == "steering" else "unsupported_combination"
        return Shot("smuggled", path, content, refused_with=code)

    def smuggled(self) -> st.SearchStrategy[Shot]:
        """Steering where only the server may put it."""
        return Grammar._smuggled(self)

    @st.composite
    @staticmethod
    def _elsewhere(draw: st.DrawFn, grammar: Grammar) -> Shot:
        path = draw(st.sampled_from(_CANNOT_STEER))
        _, body = draw(Grammar._body(grammar))
        steering = draw((wild() | Grammar._field(grammar)).filter(lambda s: s is not None))
        content = dumps({**body, "steering": steering}).encode()
        # What is no JSON, or too deep for a parser, is for the route itself to refuse.
        code = "unsupported_combination" if _readable(content) else None
        return Shot("elsewhere", path, content, refused_with=code)

    def elsewhere(self) -> st.SearchStrategy[Shot]:
        """Steering sent to routes that could only ignore it."""
        return Grammar._elsewhere(self)

    @st.composite
    @staticmethod
    def _damaged(draw: st.DrawFn, grammar: Grammar) -> Shot:
        path, body = draw(Grammar._body(grammar))
        text = dumps({**body, "steering": draw(Grammar._field(grammar))})
        content = text.encode()
        at = draw(st.integers(0, len(content)))
        damaged = draw(
            st.sampled_from(
                [
                    content[:at],
                    content[:at] + draw(st.binary(min_size=1, max_size=3)) + content[at:],
                    text.encode("utf-16"),
                    text.encode("utf-32"),
                    b"\xef\xbb\xbf" + content,
                    content + content,
                    b"",
                    content.replace(b'"', b"\xff"),
                    content.replace(b"steering", rb"\u0073teering"),
                ]
            )
        )
        headers = draw(
            st.sampled_from(
                [
                    JSON_HEADERS,
                    JSON_HEADERS,
                    {},
                    {"content-type": "text/plain"},
                    {"content-type": "application/x-www-form-urlencoded"},
                    {"content-type": "multipart/form-data; boundary=x"},
                    {"content-type": "application/json; charset=utf-16"},
                    {**JSON_HEADERS, "content-encoding": "gzip"},
                ]
            )
        )
        return Shot("damaged", path, damaged, headers=headers)

    def damaged(self) -> st.SearchStrategy[Shot]:
        """Bytes cut off, put in or encoded otherwise, and headers that say something else."""
        return Grammar._damaged(self)

    @st.composite
    @staticmethod
    def _sae_route(draw: st.DrawFn, grammar: Grammar) -> Shot:
        name = draw(st.sampled_from([*sorted(grammar.saes) * 9, *TEXTS]) | st.text(max_size=8))
        index = draw(st.integers(-2, 200).map(str) | st.sampled_from(["9" * 5000, "1.0"]) | _text)
        query = {
            key: draw(st.integers(-1, 1001).map(str) | _text)
            for key in draw(st.sets(st.sampled_from(["query", "limit", "offset", "x"])))
        }
        below = draw(st.sampled_from(["", "/features", f"/features/{_quoted(index)}", "/x", "/"]))
        path = f"/v1/saes/{_quoted(name)}{below}"
        if query:
            path += "?" + urlencode(query, errors="surrogatepass")
        return Shot("sae routes", path, method="GET", headers={})

    def sae_route(self) -> st.SearchStrategy[Shot]:
        """Cards, lists of features and features, by names and indices of every kind."""
        return Grammar._sae_route(self)

    @st.composite
    @staticmethod
    def _inspect(draw: st.DrawFn, grammar: Grammar) -> Shot:
        name = draw(st.sampled_from(sorted(grammar.saes)))
        text = draw(st.sampled_from(grammar.prompts))
        said = [{"role": "user", "content": text}]
        body: Any = draw(st.sampled_from([{"prompt": text}, {"messages": said}]))
        options = {
            "top_k": st.sampled_from([1, 64, None, 0, 65, True, 2.0]),
            "aggregate": st.sampled_from(["max", "mean", "frequency", None, "MAX", 1]),
            "special_tokens": st.sampled_from([True, False, None, 1]),
            "steering": wild(),
            "messages": wild(),
            "prompt": wild(),
            "model": _leaf,
        }
        for key in draw(st.sets(st.sampled_from(sorted(options)), max_size=2)):
            body = {**body, key: draw(options[key])}
        if 50 < draw(_percent) < 61:
            body = draw(wild())
        return Shot("inspect", f"/v1/saes/{name}/inspect", dumps(body).encode())

    def inspect(self) -> st.SearchStrategy[Shot]:
        """Texts to inspect, right and wrong."""
        return Grammar._inspect(self)


_OTHERS: Final = ("/v1/responses", "/v1/messages")
_ENGINE_KEYS: Final = ("steering", "steering_ticket", "steering_inspect", "steering_plan")
_CANNOT_STEER: Final = (
    *("/tokenize", "/v1/embeddings", "/v1/chat/completions/batch", "/invocations"),
    *("/v1/messages/count_tokens", "/generative_scoring", "/v1/completions/x", "/nowhere"),
)


@st.composite
def _mutated(draw: st.DrawFn, fields: st.SearchStrategy[dict[str, Any]]) -> Any:
    tree: Any = draw(fields)
    for _ in range(draw(st.integers(1, 3))):
        tree = draw(_with_one_change(tree))
    return tree


@st.composite
def _with_one_change(draw: st.DrawFn, tree: Any) -> Any:
    """`tree` with one node, at any depth, replaced, dropped, doubled, renamed or added to."""
    if isinstance(tree, list) and tree and draw(st.booleans()):
        i = draw(st.integers(0, len(tree) - 1))
        return [*tree[:i], draw(_with_one_change(tree[i])), *tree[i + 1 :]]
    if isinstance(tree, dict) and tree:
        key = draw(st.sampled_from(sorted(tree)))
        change = draw(st.sampled_from(["deeper"] * 3 + ["drop", "double", "rename", "add"]))
        if change == "deeper":
            return {**tree, key: draw(_with_one_change(tree[key]))}
        if change == "drop":
            return {k: v for k, v in tree.items() if k != key}
        if change == "double":
            return Pairs((*tree.items(), (key, draw(wild()))))
        if change == "rename":
            name = draw(st.sampled_from([key.upper(), f"{key} ", f"{key}\0", f"{key}s", key[::-1]]))
            return {(name if k == key else k): v for k, v in tree.items()}
        return {**tree, draw(_text): draw(wild())}
    if isinstance(tree, list):
        return draw(st.sampled_from([[], tree * 65, [tree], {}])) if tree else [draw(wild())]
    return draw(wild())


def examples(strategy: st.SearchStrategy[Shot], count: int, first_seed: int) -> Iterator[Shot]:
    """`count` examples, the same for the same seed; fewer where there are no more."""
    left = count
    for number in range(first_seed, first_seed + 10 * (count // EXAMPLES + 1)):
        drawn = _drawn(strategy, min(EXAMPLES, left), number)
        yield from drawn
        left -= len(drawn)
        if left <= 0:
            return


def _drawn(strategy: st.SearchStrategy[Shot], count: int, number: int) -> list[Shot]:
    found: list[Shot] = []

    @seed(number)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def draw(shot: Shot) -> None:
        found.append(shot)

    draw()
    return found[:count]


def _quoted(text: str) -> str:
    return quote(text, safe="", errors="surrogatepass")


def _readable(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True

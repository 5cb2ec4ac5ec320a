"""Writes templates.json and tiktoken_samples.json beside this file, with Python's Jinja2 and tiktoken as the oracles.

Jinja2 is set up as `apply_chat_template` of transformers sets it up. Needs: jinja2==3.1.6, tiktoken==0.14.0.
"""

import base64
import json
from pathlib import Path

import jinja2
import tiktoken
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = Path(__file__).parent
GOLDEN = HERE / "../../../../tests/golden"


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` renders its body."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def environment():
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = raise_exception
    return env


MESSAGES = [
    {"role": "system", "content": "Be <b>terse</b> & \"kind\"."},
    {"role": "user", "content": "  naïve 人 🙂?\n"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "function": {"name": "sum", "arguments": {"b": 1.0, "a": [1, 2.5e-7, 1e16, -0.0, True, None], "é": "\u007f\t/"}}}]},
    {"role": "tool", "content": "{\"x\": 'y'}"},
    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "two"}]},
]
TOOLS = [{"type": "function", "function": {"name": "sum", "description": "Adds <numbers> & 'more'",
                                           "parameters": {"type": "object", "properties": {}, "required": ["b", "a"]}}}]

TESTS = ("defined", "undefined", "none", "string", "number", "integer", "float", "boolean", "iterable", "sequence", "mapping", "true", "false")

# Name, template, and what differs from: all messages, no tools, a generation prompt.
CASES = [
    ("whitespace control", """
{%- for message in messages %}
    {% if message.role == 'user' %}
  [{{ message.role }}]
    {%- elif loop.first -%}
  first
    {% else %}
other
    {% endif %}
{% endfor %}
end
""", {}),
    ("lstrip and inline blocks", "a\n  {% if true %}\nb {% if true %}c{% endif %}\n  {{ 'd' }}\n {# note #}\ne\n  {% endif %}\nf", {}),
    ("no html escapes", "{{ messages[0].content }}{{ messages[0] | tojson }}{{ messages[0] | tojson | e }}{{ '<&>' ~ messages[3].content }}", {}),
    ("special tokens", "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token is defined }}|{{ bos_token + 'x' }}",
     {"config": {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}}),
    ("absent variables", "{{ tools is none }}{{ documents is none }}{{ nothing is defined }}{{ nothing }}[{{ tools }}]", {}),
    ("tojson", "{{ messages[2].tool_calls | tojson }}", {}),
    ("tojson ascii", "{{ messages[:3] | tojson(ensure_ascii=True) }}", {}),
    ("tojson not ascii", "{{ messages[2] | tojson(ensure_ascii=False) }}", {}),
    ("tojson indent", "{{ tools | tojson(indent=2) }}|{{ {} | tojson(indent=4) }}|{{ [[], [1]] | tojson(indent=1) }}", {"tools": TOOLS}),
    ("tojson separators", "{{ tools | tojson(separators=(',', ':')) }}{{ tools | tojson(indent=1, separators=(' ,', ' : ')) }}", {"tools": TOOLS}),
    ("tojson sort_keys", "{{ tools | tojson(sort_keys=True) }}{{ {'b': 1, 'a': {'d': 1, 'c': 2}} | tojson(sort_keys=true, indent=none) }}", {"tools": TOOLS}),
    ("tojson keys", "{{ {1: 'a', 2.5: 'b', none: 'c'} | tojson }}", {}),
    ("tojson floats", "{{ numbers | tojson }}", {"extra": {"numbers": [
        0.1, 1e15, 1e16, 123456789012345680.0, 0.0001, 0.00001, 1.5e300, 5e-324, -2.5, 100.0, 18446744073709551615, -7]}}),
    ("python printing", "{{ true }} {{ none }} {{ [1, 'a', none, 2.0] }} {{ {'a': [true, \"it's\"]} }} {{ (1, 2) }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 1e3 }}", {}),
    ("string methods", "{{ ' x '.strip() }}|{{ 'a,b'.split(',')[-1] }}|{{ 'abc'.startswith('ab') }}|{{ 'abc'.endswith('c') }}|"
                       "{{ 'abc'.upper().lower().title() }}|{{ 'xxaxx'.strip('x') }}|{{ 'a-b'.replace('-', '+') }}|"
                       "{{ '\\n a'.lstrip('\\n') }}|{{ 'a</think>b'.split('</think>')[0].rstrip('\\n').split('<think>')[-1] }}|{{ 'abc'.find('c') }}", {}),
    ("slices and reverse", "{{ messages[::-1] | map(attribute='role') | join(',') }}|{{ messages[1:3] | length }}|{{ 'hello'[1:-1] }}|{{ (messages | last).role }}", {}),
    ("dict methods", "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}{{ messages[0].get('name', 'none') }}{{ messages[0].keys() | list }}", {}),
    ("namespace", "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.found = true %}{% set ns.n = ns.n + loop.index0 %}{% endif %}{% endfor %}{{ ns.found }} {{ ns.n }}", {}),
    ("loop controls", "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{% if loop.index0 == 3 %}{% break %}{% endif %}{{ m.role }},{% endfor %}", {}),
    ("generation tags", "{% for m in messages %}\n{%- if m.role == 'user' %}\nU\n{% else %}\n{% generation %}\nA{{ m.role }}\n{%- endgeneration -%}\n  {% endif %}\n{% endfor %}{%- generation -%} x {% endgeneration %}!", {}),
    ("macros and tests", "{% macro show(m, sep=':') %}{{ m.role }}{{ sep }}{% if m.content is string %}s{% elif m.content is iterable and m.content is not mapping %}{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('+') }}{% else %}-{% endif %}{% endmacro %}{% for m in messages %}{{ show(m) }} {% endfor %}{{ show(messages[0], sep='=') }}", {}),
    ("generation prompt", "{% if add_generation_prompt %}<a>{% else %}none{% endif %}", {"add_generation_prompt": False}),
    ("template kwargs", "{{ enable_thinking }}{{ messages | length }}{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}",
     {"extra": {"enable_thinking": False, "messages": "shadowed"}}),
    ("raise_exception", "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('No tools, <please>: ' + m.role) }}{% endif %}{% endfor %}", {}),
    ("raise in macro", "{% macro fail() %}{{ raise_exception('deep') }}{% endmacro %}{{ fail() }}", {}),
    ("type tests", "".join(
        f"{{{{ [{', '.join(f'({value}) is {test}' for test in TESTS)}] }}}}\n"
        for value in ("nothing", "none", "true", "1", "1.5", "'s'", "[1]", "{'a': 1}", "(1, 2)", "messages", "range(3)")), {}),
    ("filters", "{{ [3, 1, 2] | sort | list }}{{ ['b', 'A'] | sort | join }}{{ {'b': 1, 'a': 2} | dictsort }}{{ {'b': 1} | items | list }}"
                "{{ nothing | default('d') }}{{ '' | default('d', true) }}{{ [1, 2] | first }}{{ [] | first is defined }}{{ 'ab' | list }}"
                "{{ ' x ' | trim }}|{{ 'a\nb' | indent(2) }}|{{ 'a\nb' | indent(2, true) }}|{{ 5 | string + '!' }}{{ '5' | int + 1 }}"
                "{{ 2.567 | round(1) }}{{ 'abc' | upper | replace('A', 'z') }}{{ [1, 2, 1] | unique | list }}{{ [[1], [2]] | sum(start=[]) }}"
                "{{ 'abc' | capitalize }}{{ [1, 2, 3] | reject('equalto', 2) | list }}{{ messages | rejectattr('content', 'none') | list | length }}"
                "{{ messages | selectattr('role', 'in', ['user', 'tool']) | map(attribute='role') | unique | join('-') }}{{ -3 | abs }}", {}),
    ("operators", "{{ 'a' in 'abc' }}{{ 'role' in messages[0] }}{{ 'x' not in messages[0] }}{{ 'a' ~ 1 ~ none }}{{ [1] + [2] }}{{ 'ab' * 2 }}{{ 7 % 3 }}"
                  "{{ 2 ** 3 }}{{ 1 if nothing }}{{ (1 if nothing) is defined }}{{ not nothing }}{{ nothing or 'x' }}{{ 'a' and 'b' }}{{ 1 == 1.0 }}"
                  "{{ true == 1 }}{{ [1, 2] == [1, 2] }}{{ messages[0]['nope'] is defined }}{{ messages[0].nope | default('-') }}{{ messages[9] is defined }}", {}),
    ("scoping", "{% set x = 1 %}{% for i in [1, 2] %}{% set x = x + i %}{{ x }}{% endfor %}{{ x }}{% if true %}{% set x = 9 %}{% endif %}{{ x }}"
                "{% for a, b in [(1, 2), (3, 4)] %}{{ a }}{{ b }}{{ loop.last }}{{ loop.revindex }}{{ loop.previtem is defined }}{% else %}none{% endfor %}"
                "{% set y %}block {{ x }}{% endset %}{{ y | trim }}{% filter upper %}f{% endfilter %}{% for m in messages if m.role == 'user' %}{{ loop.index }}{% endfor %}"
                "{% for m in messages recursive %}{{ loop.depth0 }}{% endfor %}", {}),
    ("undefined length", "{{ nothing | length }}{% for x in nothing %}x{% endfor %}{% if nothing %}y{% endif %}", {}),
    ("trailing newline", "a\n\n", {}),
    ("tool template", None, {"tools": TOOLS, "named": {"default": "plain", "tool_use": "tools: {{ tools | length }}"}}),
    ("default template", None, {"named": {"tool_use": "tools", "default": "plain"}}),
]


def render(template, case):
    values = {k: v if isinstance(v, str) else v["content"] for k, v in case["config"].items() if v is not None}
    values |= {"documents": None} | case["extra"]
    values |= {key: case[key] for key in ("messages", "tools", "add_generation_prompt")}
    try:
        return {"expected": environment().from_string(template).render(**values)}
    except jinja2.exceptions.TemplateError as error:
        return {"raised": error.message}


def template_cases():
    cases = []
    for name, template, changes in CASES:
        case = {"name": name, "template": template, "named": None, "messages": MESSAGES, "tools": None,
                "add_generation_prompt": True, "extra": {}, "config": {}} | changes
        used = template if template else case["named"]["tool_use" if case["tools"] else "default"]
        cases.append(case | render(used, case))
    return cases


def tiktoken_samples():
    # The pattern is written down once, in the generator of the golden models.
    source = (GOLDEN / "make_tiny.py").read_text()
    start = source.index("KIMI_PATTERN = ")
    scope = {}
    exec(source[start:source.index("])", start) + 2], scope)
    folder = GOLDEN / "kimi_k2-tiktoken"
    lines = (folder / "tiktoken.model").read_text().split("\n")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    specials = {token["content"]: int(id_) for id_, token in config["added_tokens_decoder"].items()}
    encoding = tiktoken.Encoding("kimi", pat_str=scope["KIMI_PATTERN"], mergeable_ranks=ranks, special_tokens=specials)
    texts = [
        "The river carried the boat.", "THE RIVER's boat'S we'Ll", "人工知能とAI、混在する漢字kanji漢字", "1234567 3.14159 ١٢٣",
        "  two  spaces   \n\n\n  and\ttabs \r\n", "    ", "\n", "e\u0301 ǅungla ʰ ªº", "🙂🙂‍🔥 ❤️", "a\u00a0b\u3000c", "___init__(self): # x",
        "<|im_user|>user<|im_middle|>hi<|im_end|><|im_e", "[BOS][EOS] [BOS", "«quotes» — dashes… !!??\n\n", "ſ'ſ I'M i'm Ⅷ ⅷ", "\u0000\u007f\ufeff",
    ]
    return [{"text": text, "ids": encoding.encode(text, allowed_special="all")} for text in texts]


if __name__ == "__main__":
    for name, make in (("templates", template_cases), ("tiktoken_samples", tiktoken_samples)):
        (HERE / f"{name}.json").write_text(json.dumps(make(), ensure_ascii=False, indent=1) + "\n")

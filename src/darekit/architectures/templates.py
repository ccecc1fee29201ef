# SPDX-License-Identifier: Apache-2.0
"""Chat templates that recipes may name: how some families lay out a conversation, in Jinja as transformers runs it.

A system message is taken where it is the first; `add_generation_prompt` ends with the beginning of an answer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChatTemplate:
    """A template's text, and the tokens that it writes: each must be one token, or a model never sees its turns.

    `end`: the one of them that ends an answer; None: the tokenizer's own end.
    """

    text: str
    tokens: tuple[str, ...] = ()
    end: str | None = None


_CHATML = """\
{%- for turn in messages -%}
    {{- '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for turn in messages -%}
    {{- '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>\\n\\n' ~ turn.content | trim ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

_ALPACA = """\
{%- for turn in messages -%}
    {%- if turn.role == 'system' -%}
        {{- turn.content ~ '\\n\\n' -}}
    {%- elif turn.role == 'user' -%}
        {{- '### Instruction:\\n' ~ turn.content ~ '\\n\\n' -}}
    {%- else -%}
        {{- '### Response:\\n' ~ turn.content ~ eos_token ~ '\\n\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '### Response:\\n' -}}
{%- endif -%}
"""

_MISTRAL = """\
{{- bos_token -}}
{%- set system = namespace(text='') -%}
{%- for turn in messages -%}
    {%- if turn.role == 'system' -%}
        {%- set system.text = turn.content ~ '\\n\\n' -%}
    {%- elif turn.role == 'user' -%}
        {{- '[INST] ' ~ system.text ~ turn.content ~ ' [/INST]' -}}
        {%- set system.text = '' -%}
    {%- else -%}
        {{- ' ' ~ turn.content ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

_EXAONE = """\
{%- for turn in messages -%}
    {%- if loop.first and turn.role != 'system' -%}
        {{- '[|system|][|endofturn|]\\n' -}}
    {%- endif -%}
    {{- '[|' ~ turn.role ~ '|]' ~ turn.content -}}
    {%- if turn.role != 'user' -%}
        {{- '[|endofturn|]' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '[|assistant|]' -}}
{%- endif -%}
"""

CHAT_TEMPLATES: dict[str, ChatTemplate] = {
    "alpaca": ChatTemplate(_ALPACA),
    "chatml": ChatTemplate(_CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "exaone": ChatTemplate(_EXAONE, ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"), "[|endofturn|]"),
    "llama3": ChatTemplate(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "mistral": ChatTemplate(_MISTRAL),
}

"""The Jinja form of a prompt template, which transformers and vLLM read from a model folder.

This file knows the language of these templates and the shape of a conversation; it does not know what any
template writes between the messages.
"""

import json
import string
from collections.abc import Iterable, Mapping

# One statement a line, each eating the line break before it. The loop over message["content"] stands in the loop
# over the messages because vLLM looks for it there to learn that parts are welcome.
_JINJA = string.Template("""\
{%- set first = 1 if messages and messages[0]["role"] == "system" else 0 %}
{%- if not first %}
{{- $default_system }}
{%- endif %}
{%- for message in messages %}
{%- if loop.index0 >= first and message["role"] != ("assistant" if (loop.index0 - first) % 2 else "user") %}
{{- raise_exception("Expected an optional system message, then user and assistant messages in turn") }}
{%- endif %}
{%- set turn = namespace(text="", joint="", images=0) %}
{%- if message["content"] is string %}
{%- set turn.text = message["content"] %}
{%- else %}
{%- for part in message["content"] %}
{%- if part["type"] == "text" %}
{%- set turn.text = turn.text + turn.joint + part["text"] %}
{%- set turn.joint = "\\n" %}
{%- else %}
{%- set turn.images = turn.images + 1 %}
{%- endif %}
{%- endfor %}
{%- endif %}
{%- set text = turn.text$broken %}
{%- if $guarded_end and text.endswith($guarded_end) %}
{%- set text = text + " " %}
{%- endif %}
{%- if message["role"] == "system" %}
{%- if $keeps_empty_system or text %}
{{- $system_open + text + $system_close }}
{%- endif %}
{%- elif message["role"] == "user" %}
{{- $user_open }}
{%- for image in range(turn.images) %}
{{- ("" if loop.first else $image_joint) + $image_open + (image_token | default($image_token)) + $image_close }}
{%- endfor %}
{{- ($image_gap if turn.images and text else "") + text + $user_close }}
{%- else %}
{{- $answer_open + $answer_gap }}
{%- generation %}
{{- text + ($answer_end if $end_in_history or not add_generation_prompt else "") }}
{%- endgeneration %}
{{- $answer_close }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- $answer_open }}
{%- endif %}""")


def fill_chat_template(texts: Mapping[str, str], flags: Mapping[str, bool], breaks: Iterable[tuple[str, str]]) -> str:
    """Return the Jinja text of a template.

    Args:
        texts: What stands before, between and after messages, by the names of `PromptTemplate`'s fields; and
            "default_system" (what stands for the system message where there is none) and "image_token".
        flags: "keeps_empty_system" and "end_in_history".
        breaks: Replacements to make in every message, in this order.
    """
    return _JINJA.substitute(
        {name: json.dumps(text) for name, text in texts.items()},
        **{name: "true" if flag else "false" for name, flag in flags.items()},
        broken="".join(f" | replace({json.dumps(old)}, {json.dumps(new)})" for old, new in breaks),
    )

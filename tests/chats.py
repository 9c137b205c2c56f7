"""Chat templates in the shapes of today's instruct models, written for the tests, and a tokenizer that has their tokens."""

import copy

# ChatML, as Qwen2.5, SmolLM2 and Yi write it.
CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
# Llama 3's. It writes BOS itself and trims.
LLAMA = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""
# Gemma's, which has no turn for the system and calls the assistant model.
GEMMA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('Roles must alternate') -}}{%- endif -%}
{%- set role = 'model' if message.role == 'assistant' else message.role -%}
{{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""
# Mistral's, which ends an answer with EOS, and whose [INST] may be plain text. It leaves a system text out.
MISTRAL = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{- '[INST] ' + message.content + ' [/INST]' -}}
{%- elif message.role == 'assistant' -%}{{- ' ' + message.content + eos_token -}}{%- endif -%}
{%- endfor -%}"""
# Phi-3's, which writes EOS after a whole talk.
PHI = """\
{%- for message in messages -%}{{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}"""
# gpt-oss's, whose last answer ends with another token than those before it.
HARMONY = """\
{%- for message in messages -%}
{%- if message.role != 'assistant' -%}{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' -}}
{%- else -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + ('<|return|>' if loop.last else '<|end|>') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"""
# Qwen3's: thinking blocks stand in front of the last answer only, and an empty one ends a prompt with enable_thinking=False.
QWEN = """\
{%- set ns = namespace(last=0) -%}
{%- for message in messages -%}{%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for message in messages -%}
{%- set content = message.content -%}
{%- set thinking = '' -%}
{%- if message.role == 'assistant' -%}
{%- if '</think>' in content -%}
{%- set thinking = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if loop.index0 > ns.last -%}
{%- set content = '<think>\\n' + thinking + '\\n</think>\\n\\n' + content.lstrip('\\n') -%}
{%- endif -%}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}"""
SHAPES = {
    "chatml": CHATML, "llama": LLAMA, "gemma": GEMMA, "mistral": MISTRAL, "phi": PHI, "harmony": HARMONY, "qwen": QWEN,
}  # fmt: skip
ENDS = {
    "chatml": "<|im_end|>", "llama": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>", "phi": "<|end|>",
    "harmony": "<|return|>", "qwen": "<|im_end|>",
}  # fmt: skip
CONTROL = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>",
    "<|return|>",
]  # fmt: skip


def with_template(tokenizer, chat_template):
    """A copy of a tokenizer with this chat template and the special tokens of all shapes."""
    copied = copy.deepcopy(tokenizer)
    copied.add_tokens(CONTROL, special_tokens=True)
    copied.add_tokens(["<think>", "</think>"])  # not special, as in Qwen3's
    copied.chat_template = chat_template
    return copied


def messages_of(*texts, system=""):
    roles = ["user", "assistant"] * len(texts)
    said = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *said] if system else said

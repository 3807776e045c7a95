"""Chat templates written for the tests, each doing what a family's does to a conversation; none is
a copy. START and END are the toy tokenizer's, END its eos."""

from toys import START

PROMPT = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
CALLS = (
    "{% for call in m.tool_calls %}{{ '\n<tool_call>\n' }}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "{{ '\n</tool_call>' }}{% endfor %}"
)
# Qwen 2.5: a system turn of its own where there is none; answers of tools in a user's turn.
QWEN2 = (
    "{% if messages[0].role != 'system' %}<|start|>system\nBe helpful.<|end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|end|>\n{% endif %}"
    "{% elif m.tool_calls %}<|start|>assistant{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    + CALLS
    + "<|end|>\n{% else %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    + PROMPT
)
# Qwen 3: thoughts behind the last question only, there always, even if they are empty.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' and not m.content.startswith('<tool_response>') %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set c = m.content or '' %}{% set r = m.reasoning_content or '' %}"
    "{% if not r and '</think>' in c %}"
    "{% set r = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or r) %}<think>\n{{ r.strip('\n') }}\n</think>\n\n"
    "{{ c.lstrip('\n') }}{% else %}{{ c }}{% endif %}{% if m.tool_calls %}"
    + CALLS
    + "{% endif %}<|end|>\n"
    "{% else %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}" + PROMPT
)
# Llama 3: strips every content; no line break at an end.
LLAMA3 = (
    "{% for m in messages %}<|start|>{{ m.role }}\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}"
)
# gpt-oss: channels; thoughts of the last answer only; the last turn ends otherwise than earlier ones.
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.tool_calls %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|stop|>"
    "{% endif %}"
    "<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json"
    "<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% else %}"
    "{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ m.thinking }}<|stop|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|end|>' if loop.last else '<|stop|>' }}{% endif %}"
    "{% elif m.role == 'tool' %}<|start|>functions to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|stop|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|stop|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# DeepSeek R1: drops all up to </think>; its prompt opens a thought.
R1 = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<|user|>{{ m.content }}"
    "{% else %}<|assistant|>{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# Gemma: the system turn goes into the first question; turns end with a token that is not eos.
GEMMA = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set said = messages[1:] %}{% else %}{% set first = '' %}{% set said = messages %}{% endif %}"
    "{% for m in said %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first else '' }}{{ m.content | trim }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)
# Mistral: no generation prompt; the system turn goes into the last question.
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set said = messages[1:] %}{% else %}{% set first = '' %}{% set said = messages %}{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in said %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in said %}{% if m.role == 'user' %}[INST] "
    "{{ first if loop.index0 == ns.last else '' }}{{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }}<|end|>{% endif %}{% endfor %}"
)
# Phi: a role is a token; the text closes with eos where nothing is asked for.
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|end|>{% endif %}"
)
# GLM: nothing ends a turn.
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TOKENS = [
    *("<|stop|>", "<|call|>", "<|channel|>", "<|message|>", "<|user|>", "<|assistant|>"),
    *("<|system|>", "[INST]", "[/INST]", "[gMASK]", "<sop>"),
]
assert START not in TOKENS

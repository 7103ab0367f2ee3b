"""The chat templates that come with the project, for models whose tokenizer brings none.

`alpaca` is Stanford Alpaca's prompt, with and without input, extended to system prompts and further turns; its stop is
the tokenizer's end token. `chatml`, `phi3` and `llama3` are the public formats of those families. Only `chatml` has a
syntax for functions (the one its users know from Hermes and Qwen); the others refuse tools instead of dropping them.
"""

from __future__ import annotations

_REFUSE_TOOLS = """
{%- if tools %}{{ raise_exception('this template has no syntax for tools: use chatml or the own template of the \
tokenizer') }}{% endif %}
{%- for message in messages %}
    {%- if message.tool_calls or message.role == 'tool' %}
        {{- raise_exception('this template has no syntax for function calls: use chatml') }}
    {%- endif %}
{%- endfor %}"""

ALPACA = (
    _REFUSE_TOOLS
    + """
{%- if eos_token is not defined %}{{ raise_exception('alpaca needs a tokenizer with an end token') }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if loop.first and message.input %}
            {{- 'Below is an instruction that describes a task, paired with an input that provides further context. ' }}
            {{- 'Write a response that appropriately completes the request.\\n\\n' }}
        {%- elif loop.first %}
            {{- 'Below is an instruction that describes a task. ' }}
            {{- 'Write a response that appropriately completes the request.\\n\\n' }}
        {%- endif %}
        {{- '### Instruction:\\n' }}
        {%- if message.input %}
            {{- message.instruction + '\\n\\n### Input:\\n' + message.input + '\\n\\n' }}
        {%- else %}
            {{- message.content + '\\n\\n' }}
        {%- endif %}
    {%- elif message.role == 'assistant' %}
        {{- '### Response:\\n' + message.content + eos_token }}
        {%- if not loop.last %}{{ '\\n\\n' }}{% endif %}
    {%- else %}
        {{- message.content + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""
)

PHI3 = (
    _REFUSE_TOOLS
    + """
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
)

LLAMA3 = (
    _REFUSE_TOOLS
    + """
{%- if bos_token is defined %}{{ bos_token }}{% endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
)

CHATML = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- 'You can call functions. Their signatures, in JSON, between <tools></tools>:\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
    {{- '\\n</tools>\\nTo call one, write its name and arguments, in JSON, ' }}
    {{- 'between <tool_call></tool_call>.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first and tools %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'tool' %}
        {{- '<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {%- else %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n' if message.content or not loop.first }}
            {{- '<tool_call>\\n{"name": ' + call.function.name | tojson }}
            {{- ', "arguments": ' + call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

BUILTIN = {"alpaca": ALPACA, "phi3": PHI3, "chatml": CHATML, "llama3": LLAMA3}

"""What docs/plugin.md says of guidance without our server, done as it is written there, in a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from guided_vllm.oracle import Guided, expected_steps
from real_server.models import TOKENS, make_reference, make_value_model

PAGE = Path(__file__).parents[2] / "docs" / "plugin.md"
ASKS = """
import json
from pathlib import Path
from vllm.exceptions import VLLMValidationError

outputs = {
    "guided": llm.generate("abc def", guided),
    "as_json": llm.generate("abc def", SamplingParams(
        temperature=0, max_tokens=64, extra_args={"qtilt": json.dumps({"value_model": "value", "eta": 0.1})})),
    "plain": llm.generate("abc def", SamplingParams(temperature=0, max_tokens=64)),
    "unknown": llm.generate("abc def", SamplingParams(max_tokens=64, extra_args={"qtilt": {"value_model": "nobody"}})),
    **{field: llm.generate("abc def", SamplingParams(
        max_tokens=64, extra_args={"qtilt": {"value_model": "value", field: asked}}))
       for field, asked in (("details", True), ("kl_budget", 0.5))},
}
refused = []
for wrong in ({"eta": 0.1}, {"value_model": "value", "eta": 0}, "{", 3):
    try:
        llm.generate("abc def", SamplingParams(extra_args={"qtilt": wrong}))
    except VLLMValidationError as error:
        refused.append(str(error))
answers = {name: [output.prompt_token_ids, list(output.outputs[0].token_ids)] for name, (output,) in outputs.items()}
Path("answers.json").write_text(json.dumps({"answers": answers, "refused": refused}))
"""


def test_the_three_lines_guide_offline(tmp_path: Path) -> None:
    reference, value = make_reference(tmp_path / "reference"), make_value_model(tmp_path / "value", seed=1)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for written, here in (
        ('"Qwen/Qwen2.5-7B-Instruct",', f'"{reference}", dtype="float32", max_model_len=128, enforce_eager=True,'),
        ("/value-models/iteration-001", str(value)),
    ):
        assert written in code
        code = code.replace(written, here)
    script = tmp_path / "script.py"
    script.write_text(f"if __name__ == '__main__':\n{_indented(code + ASKS)}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    written = json.loads((tmp_path / "answers.json").read_text())
    answers = written["answers"]
    assert answers["as_json"] == answers["guided"] != answers["plain"]
    for name, guided in (("guided", Guided(value, 0.1, 20, "qsharp", None, 1.0, "mean")), ("plain", None)):
        prompt, tokens = answers[name]
        steps = expected_steps(reference, prompt, tokens, guided, 0.0, TOKENS)
        for token, step in zip(tokens, steps, strict=True):
            assert float(step.log_probs_V[token]) > float(step.log_probs_V.max()) - 1e-4
    log = done.stdout + done.stderr
    for name, why in (
        ("unknown", b"value model nobody@1 isn't resident; resident: value@1"),
        ("details", b"guidance.details is True, and only behind qtilt-server"),
        ("kl_budget", b"guidance.kl_budget is 0.5, and only behind qtilt-server"),
    ):
        assert len(answers[name][1]) == 1, "a request that can't be guided ends at once"
        assert why in log
    assert len(written["refused"]) == 4
    assert "expected value_model" in written["refused"][0]
    assert "guidance.eta is 0" in written["refused"][1]


def _indented(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.splitlines())

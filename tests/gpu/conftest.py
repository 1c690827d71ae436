"""What must be set before Triton compiles: vLLM's attention in float32 would otherwise round to TensorFloat-32."""

import os

os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

"""The qtilt trainer: roll-outs over HTTP in, value models out. It never imports the server or vLLM."""

"""Ways to run a value model's backbone over one packed step."""

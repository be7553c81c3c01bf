"""LoRA, DoRA and full updates of Linear and Conv2d layers."""

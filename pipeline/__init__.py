"""Distillation: a frozen teacher, a small student in a DeepSpeed engine, exact resume, export."""

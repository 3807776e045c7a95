"""Balancers in training loops that are not ours: any PyTorch loop (`loop`), Hugging Face's Trainer
and TRL's (`trainer`).
"""

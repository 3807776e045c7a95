"""KPE: a frozen language model that learns to read knowledge (Zhao et al., ACL 2023)."""

"""ZeroAE (Guo et al., Findings of ACL 2023): texts without labels, the names of their classes."""

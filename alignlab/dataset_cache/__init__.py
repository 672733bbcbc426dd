"""What the frozen models made of a data set, kept on disk: texts, latents, teacher features.

`key` says what an entry is of, `store` reads and writes; both are imported by themselves, since
the second needs torch.
"""

"""What trains nano, the default model of `minigpt4`: its examples, its first objective and its recipe.

    python -m nano.train nano/recipe.yaml

Not part of the package, which it uses as any other training would: batches and an objective of its own go into
`minigpt4.training.run.run`.
"""

"""The emoji world: small scenes of animals and objects, and models trained on them that ship with the package."""

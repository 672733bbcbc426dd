"""How the embedded tiny models are made: `alignlab assets build`."""

"""How the embedded models and judges were made: one resumable command each."""

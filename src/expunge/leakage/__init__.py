"""What may be said about how much of a concept is left: bounds on I(C; X), their controls, and their only wording."""

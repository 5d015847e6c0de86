"""The suite: tiny models and adapters with what each must answer, for engines of any kind."""

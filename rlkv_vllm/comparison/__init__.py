"""`rlkv compare`: methods that find heads, compared on your models by one resumable command."""

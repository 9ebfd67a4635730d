"""What a user may set: fields, rules, and their composition from `conf/`. No torch."""

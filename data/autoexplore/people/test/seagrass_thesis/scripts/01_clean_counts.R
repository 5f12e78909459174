# Drops frames with more than 400 shoots: typing errors, the densest real one had 263.
library(readr)
raw <- read_csv("data/raw/counts.csv")
ok <- subset(raw, shoots <= 400 & !is.na(site))
ok$month <- as.integer(format(ok$date, "%m"))
write_csv(ok, "data/clean/shoots_2022.csv")
message(nrow(raw) - nrow(ok), " frames dropped")

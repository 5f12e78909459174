# Pairs per plot and year, Poisson model with plot as random effect
# Visit 4 is left out (storm)
library(lme4)
d <- read.csv("all_counts.csv")
d <- subset(d, visit != 4)
m <- glmer(pairs ~ year + (1 | plot), family = poisson, data = d)
summary(m)

package code

// Valid tests the check letter. O and I never occur in codes,
// people misread them when they type.
func Valid(code string) bool {
	return len(code) == 10 && letter(code[:9]) == code[9]
}

func letter(code string) byte {
	const letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
	sum := 0
	for i := range code {
		sum += (i + 1) * int(code[i])
	}
	return letters[sum%len(letters)]
}

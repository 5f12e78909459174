package pal.ui

val Leaf = Color(0xFF3B7A57)
val Clay = Color(0xFFB5651D)

// dynamic colours are off: green on a purple wallpaper looked ill
@Composable
fun PalTheme(content: @Composable () -> Unit) =
    MaterialTheme(colorScheme = lightColorScheme(primary = Leaf, secondary = Clay), content = content)

package pal.ui

// Pictures are scaled to 1280 pixels before they are stored.
// Some phones lie: EXIF rotation must be applied by hand.
const val LONG_EDGE = 1280

@Composable
fun PhotoPicker(onPicked: (Uri) -> Unit) {
    val launcher = rememberLauncherForActivityResult(PickVisualMedia()) { it?.let(onPicked) }
    Button(onClick = { launcher.launch(ImageOnly) }) { Text("Choose") }
}

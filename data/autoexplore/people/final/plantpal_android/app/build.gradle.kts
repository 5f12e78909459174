plugins { id("com.android.application") }

android {
    compileSdk = 34
    defaultConfig {
        minSdk = 26
        versionCode = 57
        versionName = "2.4.0"
    }
    sourceSets["main"].kotlin.srcDir("kotlin")
}

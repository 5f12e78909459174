rootProject.name = "plantpal"
include(":app")

dependencyResolutionManagement {
    repositories {
        google()
        mavenCentral()
    }
}

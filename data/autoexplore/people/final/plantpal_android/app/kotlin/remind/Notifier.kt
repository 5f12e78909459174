package pal.remind

// One notification for all plants; more than 5 are shown as a number only.
object Notifier {
    const val CHANNEL = "watering"
    private const val MOST = 5

    fun show(context: Context, due: List<Plant>) {
        val text = if (due.size > MOST) "${due.size} plants" else due.joinToString { it.name }
        val note = NotificationCompat.Builder(context, CHANNEL).setContentText(text).build()
        NotificationManagerCompat.from(context).notify(1, note)
    }
}

// Runs daily at 7:30 local time. Skips plants that are dormant (November to February).
package pal.remind

import android.content.Context
import androidx.work.CoroutineWorker
import androidx.work.WorkerParameters
import java.time.LocalDate
import pal.db.plants

class WateringWorker(context: Context, params: WorkerParameters) : CoroutineWorker(context, params) {
    override suspend fun doWork(): Result {
        val day = LocalDate.now().toEpochDay()
        val due = plants(applicationContext).due(day).filterNot { it.dormant }
        if (due.isNotEmpty()) Notifier.show(applicationContext, due)
        return Result.success()
    }
}

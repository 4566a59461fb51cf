// A program that logs each line of its standard input, by logback or log4j2: java Writer logback|log4j
import java.io.BufferedReader;
import java.io.InputStreamReader;

public class Writer {
    public static void main(String[] arguments) throws Exception {
        BufferedReader input = new BufferedReader(new InputStreamReader(System.in));
        boolean logback = arguments[0].equals("logback");
        for (String line = input.readLine(); line != null; line = input.readLine()) {
            if (logback) {
                Logback.info(line);
            } else {
                Log4j.info(line);
            }
        }
        if (!logback) {
            Log4j.stop();
        }
    }
}

class Logback {
    static final org.slf4j.Logger LOGGER = org.slf4j.LoggerFactory.getLogger("writer");

    static void info(String line) {
        LOGGER.info(line);
    }
}

class Log4j {
    static final org.apache.logging.log4j.Logger LOGGER = org.apache.logging.log4j.LogManager.getLogger("writer");

    static void info(String line) {
        LOGGER.info(line);
    }

    static void stop() {
        org.apache.logging.log4j.LogManager.shutdown();
    }
}

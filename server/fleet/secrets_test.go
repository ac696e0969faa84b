package fleet

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

func TestS3IsNotToldWithItsKey(t *testing.T) {
	own := S3{Endpoint: "https://s3.example.com", Bucket: "b", AccessKeyID: "id", SecretAccessKey: "hunter2", Prefix: "p"}
	session := &Session{ID: "a", Spec: Spec{Storage: Storage{Mode: ModeSnapshot, S3: &own}}}
	var log bytes.Buffer
	for _, h := range []slog.Handler{slog.NewTextHandler(&log, nil), slog.NewJSONHandler(&log, nil)} {
		slog.New(h).Info("x", "own", own, "pointer", &own)
	}
	told := log.String()
	for _, format := range []string{"%v", "%+v", "%#v", "%s"} {
		told += fmt.Sprintf(format+"\n"+format+"\n", own, &own)
		told += fmt.Sprintf(format+"\n", session)
		told += fmt.Sprintf(format+"\n", struct{ S any }{own})
	}
	if strings.Contains(told, "hunter2") {
		t.Errorf("the key is in\n%s", told)
	}
	if n := strings.Count(told, "s3://b/p at https://s3.example.com"); n < 12 {
		t.Errorf("it is named %d times in\n%s", n, told)
	}
}

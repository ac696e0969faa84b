package nodev1

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

func TestAssignmentsAreToldWithoutSecrets(t *testing.T) {
	st := &AssignedStorage{Mode: cloudcodev1.Storage_SNAPSHOT, Bucket: "b", SecretAccessKey: "hunter2", EncryptionKey: []byte("hunter2")}
	a := &Assignment{
		SessionId: "s1", Generation: 7, Storage: st, OpencodePassword: "hunter2",
		Spec: &cloudcodev1.SessionSpec{Storage: &cloudcodev1.Storage{S3: &cloudcodev1.S3Storage{SecretAccessKey: "hunter2"}}},
	}
	var log bytes.Buffer
	for _, h := range []slog.Handler{slog.NewTextHandler(&log, nil), slog.NewJSONHandler(&log, nil)} {
		slog.New(h).Info("x", "storage", st, "assignment", a)
	}
	told := log.String()
	for _, format := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x"} {
		told += fmt.Sprintf(format+"\n"+format+"\n"+format+"\n", st, a, []any{a})
	}
	if strings.Contains(told, "hunter2") || strings.Contains(told, fmt.Sprintf("%x", "hunter2")) {
		t.Errorf("a secret is in\n%s", told)
	}
	if !strings.Contains(told, "s3://b/") || !strings.Contains(told, "s1 generation 7") {
		t.Errorf("it does not say what it is of:\n%s", told)
	}
	if told := fmt.Sprint((*AssignedStorage)(nil), (*Assignment)(nil)); told == "" {
		t.Error("nothing")
	}
}

package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

func TestWhatCallersGetToSee(t *testing.T) {
	var log bytes.Buffer
	s, err := New(Config{DataDir: t.TempDir(), Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	if err != nil {
		t.Fatal(err)
	}
	call := func(method string, fn func() error) error {
		log.Reset()
		_, err := s.unary(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: method}, func(context.Context, any) (any, error) { return nil, fn() })
		return err
	}
	const get = "/cloudcode.v1.SessionService/GetSession"
	for name, c := range map[string]struct {
		fn     func() error
		code   codes.Code
		reason string
		hidden bool
	}{
		"class":          {func() error { return fmt.Errorf("%w: on /dev/sda", fleet.ErrResourceExhausted) }, codes.ResourceExhausted, "OUT_OF_SPACE", false},
		"panic":          {func() error { panic("secret detail") }, codes.Internal, "INTERNAL", true},
		"no class":       {func() error { return errors.New("secret detail") }, codes.Internal, "INTERNAL", true},
		"inner status":   {func() error { return fmt.Errorf("secret detail: %w", status.Error(codes.NotFound, "x")) }, codes.Internal, "INTERNAL", true},
		"status":         {func() error { return grpcerr.New(codes.Aborted, "X", "x") }, codes.Aborted, "X", false},
		"caller is gone": {func() error { return context.Canceled }, codes.Canceled, "", false},
	} {
		err := call(get, c.fn)
		if status.Code(err) != c.code || grpcerr.Reason(err) != c.reason {
			t.Errorf("%s: %v", name, err)
		}
		if c.hidden && (strings.Contains(err.Error(), "secret detail") || !strings.Contains(log.String(), "secret detail")) {
			t.Errorf("%s: the text belongs into the log and not to the caller: %v, %s", name, err, log.String())
		}
	}
	if err := call(get, func() error { return nil }); err != nil || !strings.Contains(log.String(), get) {
		t.Errorf("a call is not logged: %v, %s", err, log.String())
	}
	if err := call("/nobody.knows/This", func() error { t.Error("called"); return nil }); status.Code(err) != codes.PermissionDenied {
		t.Errorf("unknown service: %v", err)
	}
	_ = call("/grpc.health.v1.Health/Check", func() error { return nil })
	if log.Len() > 0 {
		t.Errorf("health checks fill the log: %s", log.String())
	}
}

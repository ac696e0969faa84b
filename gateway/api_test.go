package gateway

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
)

func TestAPI(t *testing.T) {
	r := start(t, Config{})
	a := r.get(r.url("", "/v1/sessions"))
	if a.code != 200 || !strings.HasPrefix(a.h.Get("Content-Type"), "application/json") || !strings.Contains(a.body, `"nextPageToken":""`) || !strings.Contains(a.body, `"sessions":[]`) {
		t.Errorf("%d %v %s", a.code, a.h, a.body)
	}
	for name := range a.h {
		if strings.HasPrefix(name, "Grpc-") {
			t.Errorf("header %s leaks", name)
		}
	}
	a = r.do(http.MethodPost, r.url("", "/v1/sessions?sessionId=main&requestId=r1"),
		strings.NewReader(`{"labels":{"team":"web"},"spec":{"resources":{"memoryBytes":"1024","cpuMillis":500}}}`))
	c := r.server.created
	if a.code != 200 || c.GetSessionId() != "main" || c.GetRequestId() != "r1" || c.GetSession().GetSpec().GetResources().GetMemoryBytes() != 1024 || c.GetSession().GetLabels()["team"] != "web" {
		t.Errorf("%d %s: the server got %v", a.code, a.body, c)
	}
	if !strings.Contains(a.body, `"state":"PENDING"`) {
		t.Error(a.body)
	}
	a = r.do(http.MethodPatch, r.url("", "/v1/sessions/main?updateMask=labels,spec.resources.memoryBytes"), strings.NewReader(`{"labels":{"a":"b"}}`))
	u := r.server.updated
	if a.code != 200 || u.GetSession().GetName() != "sessions/main" || strings.Join(u.GetUpdateMask().GetPaths(), ",") != "labels,spec.resources.memory_bytes" {
		t.Errorf("%d %s: the server got %v", a.code, a.body, u)
	}
	a = r.do(http.MethodPatch, r.url("", "/v1/sessions/main"), strings.NewReader(`{"etag":"e","labels":{"a":"b"},"spec":{"resources":{"memoryBytes":"7"}}}`))
	u = r.server.updated
	if got := strings.Join(u.GetUpdateMask().GetPaths(), ","); a.code != 200 || got != "etag,labels,spec.resources.memory_bytes" {
		t.Errorf("without a mask the server gets what is set: %d %q", a.code, got)
	}
	a = r.do(http.MethodPatch, r.url("", "/v1/sessions/main?updateMask=labels.teamName,spec.env.myKey,spec.nodeSelector.aB&updateMask=*"), strings.NewReader(`{}`))
	if got := strings.Join(r.server.updated.GetUpdateMask().GetPaths(), ","); got != "labels.teamName,spec.env.myKey,spec.node_selector.aB,*" {
		t.Errorf("%d %s: mask %s", a.code, a.body, got)
	}
	for _, c := range []struct {
		method, path, body string
		code               int
		grpc               codes.Code
	}{
		{"GET", "/v1/sessions/nobody", "", 404, codes.NotFound},
		{"POST", "/v1/sessions", `{"nmae":"x"}`, 400, codes.InvalidArgument},
		{"POST", "/v1/sessions", `{`, 400, codes.InvalidArgument},
		{"GET", "/v1/nothing/at/all", "", 404, codes.NotFound},
		{"PUT", "/v1/sessions", "{}", 405, codes.Unimplemented},
		{"GET", "/v1/nodes", "", 501, codes.Unimplemented},
		{"POST", "/v1/sessions", `{"labels":{"a":"` + strings.Repeat("x", maxBody) + `"}}`, 413, codes.InvalidArgument},
	} {
		a := r.do(c.method, r.url("", c.path), strings.NewReader(c.body), "X-HTTP-Method-Override", "DELETE")
		var st struct {
			Code    codes.Code
			Message string
			Details []map[string]any
		}
		if err := json.Unmarshal([]byte(a.body), &st); err != nil || a.code != c.code || st.Code != c.grpc || st.Message == "" {
			t.Errorf("%s %s: %d %s (%v)", c.method, c.path, a.code, a.body, err)
		}
		if c.code == 404 && strings.Contains(c.path, "nobody") && (len(st.Details) != 1 || st.Details[0]["reason"] != "SESSION_NOT_FOUND") {
			t.Errorf("details are lost: %s", a.body)
		}
	}
	var doc struct{ Paths map[string]any }
	if a := r.get(r.url("", "/v1/openapi.json")); json.Unmarshal([]byte(a.body), &doc) != nil || doc.Paths["/v1/sessions"] == nil {
		t.Errorf("openapi: %d %.200s", a.code, a.body)
	}
}

func entry(i int) *cloudcodev1.LogEntry {
	return &cloudcodev1.LogEntry{Time: timestamppb.Now(), Stream: "stdout", Line: fmt.Sprint("line ", i)}
}

func TestLogs(t *testing.T) {
	r := start(t, Config{})
	r.put(session("main", cloudcodev1.Session_RUNNING, 1))
	var got *cloudcodev1.ReadSessionLogsRequest
	r.server.logs = func(req *cloudcodev1.ReadSessionLogsRequest, s grpc.ServerStreamingServer[cloudcodev1.LogEntry]) error {
		got = req
		for i := range 3 {
			if err := s.Send(entry(i)); err != nil {
				return err
			}
		}
		return nil
	}
	a := r.get(r.url("", "/v1/sessions/main/logs?tailLines=3"), "Accept", "text/plain")
	if a.code != 200 || a.body != "line 0\nline 1\nline 2\n" || got.GetName() != "sessions/main" || got.GetTailLines() != 3 {
		t.Errorf("%d %q, %v", a.code, a.body, got)
	}
	a = r.get(r.url("", "/v1/sessions/main/logs"))
	lines := strings.Split(strings.TrimSpace(a.body), "\n")
	var first struct {
		Result struct{ Line, Stream, Time string }
	}
	if err := json.Unmarshal([]byte(lines[0]), &first); err != nil || len(lines) != 3 || first.Result.Line != "line 0" || first.Result.Time == "" {
		t.Errorf("%q %v", a.body, err)
	}
	if a := r.get(r.url("", "/v1/sessions/main/logs?tailLines=x")); a.code != 400 {
		t.Errorf("%d %s", a.code, a.body)
	}
	r.server.logs = func(*cloudcodev1.ReadSessionLogsRequest, grpc.ServerStreamingServer[cloudcodev1.LogEntry]) error {
		return grpcerr.New(codes.FailedPrecondition, "NOT_PLACED", "on no node yet")
	}
	if a := r.get(r.url("", "/v1/sessions/main/logs")); a.code != 400 || !strings.Contains(a.body, "NOT_PLACED") {
		t.Errorf("%d %s", a.code, a.body)
	}

	// Followed: headers come without a line, and each line at once.
	next := make(chan int)
	var ended atomic.Bool
	r.server.logs = func(_ *cloudcodev1.ReadSessionLogsRequest, s grpc.ServerStreamingServer[cloudcodev1.LogEntry]) error {
		defer ended.Store(true)
		for {
			select {
			case i := <-next:
				if i < 0 {
					return grpcerr.New(codes.Unavailable, "NODE_UNREACHABLE", "the node has gone")
				}
				if err := s.Send(entry(i)); err != nil {
					return err
				}
			case <-s.Context().Done():
				return s.Context().Err()
			}
		}
	}
	resp, body := r.stream(r.url("", "/v1/sessions/main/logs?follow=true"), "Accept", "text/plain")
	for i := range 2 {
		next <- i
		if line, err := body.ReadString('\n'); err != nil || line != fmt.Sprintf("line %d\n", i) {
			t.Fatalf("%q %v", line, err)
		}
	}
	resp.Body.Close()
	eventually(t, "the server learns that the reader has gone", ended.Load)

	_, body = r.stream(r.url("", "/v1/sessions/main/logs?follow=true"))
	next <- 1
	_, _ = body.ReadString('\n')
	next <- -1
	rest, err := io.ReadAll(body)
	if err == nil || !strings.Contains(string(rest), `{"error":{"code":14`) {
		t.Errorf("a log that breaks off looks whole: %q %v", rest, err)
	}
}

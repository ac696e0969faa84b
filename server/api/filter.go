package api

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"go.einride.tech/aip/filtering"
	expr "google.golang.org/genproto/googleapis/api/expr/v1alpha1"

	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

const maxFilterBytes = 4 << 10

// predicate says whether a session is meant.
type predicate func(*fleet.Session) bool

// parseFilter reads an AIP-160 filter. An empty one means every session.
func parseFilter(filter string) (predicate, error) {
	if strings.TrimSpace(filter) == "" {
		return func(*fleet.Session) bool { return true }, nil
	}
	if len(filter) > maxFilterBytes {
		return nil, fmt.Errorf("has %d bytes; at most %d are allowed", len(filter), maxFilterBytes)
	}
	var p filtering.Parser
	p.Init(filter)
	parsed, err := p.Parse()
	if err != nil {
		// The library draws the place over several lines.
		text := strings.Join(strings.Fields(err.Error()), " ")
		return nil, fmt.Errorf("cannot be read: %s (write values and label keys with hyphens in quotes: labels.\"my-key\" = \"a-b\")", text)
	}
	return compile(parsed.GetExpr())
}

func compile(e *expr.Expr) (predicate, error) {
	call := e.GetCallExpr()
	if call == nil {
		return nil, errors.New("bare words are not searched for: compare a field, for example state = RUNNING")
	}
	args := call.GetArgs()
	switch call.GetFunction() {
	case filtering.FunctionAnd, filtering.FunctionFuzzyAnd:
		ps, err := compileAll(args)
		return func(s *fleet.Session) bool {
			return !slices.ContainsFunc(ps, func(p predicate) bool { return !p(s) })
		}, err
	case filtering.FunctionOr:
		ps, err := compileAll(args)
		return func(s *fleet.Session) bool {
			return slices.ContainsFunc(ps, func(p predicate) bool { return p(s) })
		}, err
	case filtering.FunctionNot:
		ps, err := compileAll(args)
		return func(s *fleet.Session) bool { return !ps[0](s) }, err
	case filtering.FunctionEquals:
		return compare(args)
	case filtering.FunctionNotEquals:
		p, err := compare(args)
		return func(s *fleet.Session) bool { return !p(s) }, err
	case filtering.FunctionHas:
		return has(args)
	}
	return nil, fmt.Errorf("%s cannot be used: there are =, !=, :, AND, OR and NOT", call.GetFunction())
}

func compileAll(args []*expr.Expr) ([]predicate, error) {
	ps := make([]predicate, len(args))
	for i, a := range args {
		p, err := compile(a)
		if err != nil {
			return nil, err
		}
		ps[i] = p
	}
	return ps, nil
}

func compare(args []*expr.Expr) (predicate, error) {
	path, want := fieldPath(args[0]), value(args[1])
	switch {
	case path[0] == "state" && len(path) == 1:
		if !slices.Contains(fleet.States, fleet.State(want)) {
			return nil, fmt.Errorf("there is no state %q: there are %v", want, fleet.States)
		}
		return func(s *fleet.Session) bool { return s.State == fleet.State(want) }, nil
	case path[0] == "node" && len(path) == 1:
		id := strings.TrimPrefix(want, "nodes/")
		return func(s *fleet.Session) bool {
			if s.Assignment == nil {
				return id == ""
			}
			return s.Assignment.Node == id
		}, nil
	case path[0] == "labels" && len(path) > 1:
		// Keys may have dots, and the language splits there.
		key := strings.Join(path[1:], ".")
		return func(s *fleet.Session) bool {
			got, ok := s.Labels[key]
			return ok && got == want
		}, nil
	}
	return nil, unknownField(path)
}

func has(args []*expr.Expr) (predicate, error) {
	path, want := fieldPath(args[0]), value(args[1])
	if path[0] != "labels" {
		return nil, unknownField(path)
	}
	if len(path) == 1 {
		return func(s *fleet.Session) bool { _, ok := s.Labels[want]; return ok }, nil
	}
	key := strings.Join(path[1:], ".")
	return func(s *fleet.Session) bool {
		got, ok := s.Labels[key]
		return ok && (want == "*" || got == want)
	}, nil
}

func unknownField(path []string) error {
	return fmt.Errorf("%q cannot be filtered by: there are state, node, labels.KEY = VALUE and labels:KEY", strings.Join(path, "."))
}

// fieldPath returns the parts of a.b.c; what is no field gives one odd part.
func fieldPath(e *expr.Expr) []string {
	if s := e.GetSelectExpr(); s != nil {
		return append(fieldPath(s.GetOperand()), s.GetField())
	}
	return []string{value(e)}
}

// value returns a value as it was written, in quotes or not.
func value(e *expr.Expr) string {
	switch k := e.GetExprKind().(type) {
	case *expr.Expr_IdentExpr:
		return k.IdentExpr.GetName()
	case *expr.Expr_SelectExpr: // a bare word with dots
		return strings.Join(fieldPath(e), ".")
	case *expr.Expr_ConstExpr:
		switch c := k.ConstExpr.GetConstantKind().(type) {
		case *expr.Constant_StringValue:
			return c.StringValue
		case *expr.Constant_Int64Value:
			return strconv.FormatInt(c.Int64Value, 10)
		case *expr.Constant_DoubleValue:
			return strconv.FormatFloat(c.DoubleValue, 'f', -1, 64)
		case *expr.Constant_BoolValue:
			return strconv.FormatBool(c.BoolValue)
		}
	}
	return ""
}

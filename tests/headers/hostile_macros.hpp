// SPDX-License-Identifier: Apache-2.0
// What Qt, Windows, X11 and curses define as macros, included before the library. The standard
// library and Eigen come first, as they do not promise to live with all of it.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numbers>
#include <span>
#include <thread>
#include <vector>
#if defined(__unix__)
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Windows: windef.h, rpcndr.h, wingdi.h
#define min(a, b) (((a) < (b)) ? (a) : (b))
#define max(a, b) (((a) > (b)) ? (a) : (b))
#define near
#define far
#define small char
#define hyper __int64
#define interface struct
#define cdecl
#define pascal
#define IN
#define OUT
#define OPTIONAL
#define CONST const
#define VOID void
#define TRUE 1
#define FALSE 0
#define ERROR 0
#define DELETE (0x00010000L)
#define NEAR
#define FAR
#define STRICT 1
#define IGNORE 0
#define OPAQUE 2
#define TRANSPARENT 1
#define ABSOLUTE 1
#define RELATIVE 2

// Qt: qtmetamacros.h, qforeach.h
#define slots
#define signals public
#define emit
#define foreach(variable, container) for (variable : container)
#define forever for (;;)

// X11: X.h, Xlib.h, Intrinsic.h
#define None 0L
#define Bool int
#define Status int
#define True 1
#define False 0
#define Success 0
#define Always 2
#define Above 0
#define Below 1
#define Complex 0
#define Unsorted 0
#define Convex 2
#define Cursor long
#define index strchr
#define rindex strrchr

// curses.h
#define move(y, x) wmove(stdscr, (y), (x))
#define clear() wclear(stdscr)
#define erase() werase(stdscr)
#define refresh() wrefresh(stdscr)
#define timeout(delay) wtimeout(stdscr, (delay))
#define scroll(window) wscrl((window), 1)
#define border(a, b, c, d, e, f, g, h) wborder(stdscr, a, b, c, d, e, f, g, h)
#define box(window, v, h) wborder((window), v, v, h, h, 0, 0, 0, 0)
#define echochar(c) wechochar(stdscr, (c))
#define instr(s) winstr(stdscr, (s))
#define delch() wdelch(stdscr)
#define insertln() winsdelln(stdscr, 1)
